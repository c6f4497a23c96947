"""The frozen list of keys, and the table of docs/configuration.md. To accept a change: python -m tests.config.generate"""

from pathlib import Path

from megatron_zebra.config.help import Key, all_keys
from megatron_zebra.config.sections import Config

KEYS = Path(__file__).with_name("keys.txt")
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: begin (written by python -m tests.config.generate) -->", "<!-- keys: end -->"


def key_list() -> str:
    """One path a line."""
    return "".join(f"{key.path}\n" for key in all_keys())


def key_tables() -> str:
    """A Markdown table a section."""
    parts = []
    for name, field in Config.model_fields.items():
        keys = [key for key in all_keys() if key.path.split(".")[0].removesuffix("[]") == name]
        about = (field.annotation.__doc__ if isinstance(field.annotation, type) else field.description) or ""
        if not hasattr(field.annotation, "model_fields"):
            about = field.description or ""
        rows = "\n".join(_row(key) for key in keys)
        parts.append(
            f"### {name}\n\n{about.strip()}\n\n| key | default | allowed | what it is |\n| --- | --- | --- | --- |\n{rows}\n"
        )
    return "\n".join(parts)


def page_with_tables(page: str) -> str:
    """``page`` with what is between the marks written anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{key_tables()}\n{END}{after}"


def _row(key: Key) -> str:
    default = f"`{key.default}`" if key.default else "required"
    allowed = key.allowed or key.kind
    unit = f" [{key.unit}]" if key.unit else ""
    cells = (f"`{key.path}`", default, allowed, key.description + unit)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    KEYS.write_text(key_list())
    PAGE.write_text(page_with_tables(PAGE.read_text()))
