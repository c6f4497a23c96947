"""docs/troubleshooting.md: what it quotes is in the code, and what in the code does not say its own cure is there."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, prose, quoted, rows

PAGE = prose(ROOT / "docs/troubleshooting.md")
SOURCES = [*sorted((ROOT / "megatron_zebra").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
# Messages may be told in docs/launching.md too, which has the launchers' own.
TOLD = [
    quote
    for page in ("troubleshooting", "launching")
    if (ROOT / f"docs/{page}.md").exists()
    for quote in quoted(prose(ROOT / f"docs/{page}.md"))
]
QUOTES = [quote for row in rows(PAGE) for quote in quoted(row[0]) if "…" in quote or " " in quote]
ERRORS = {
    "UserError", "RankLost", "NoDocumentLeft", "CheckpointError", "DamagedCheckpoint", "DiskFull", "IncompleteCheckpoint", "NotTaken", "OtherFormat",
}  # fmt: skip
# Words with which a message says what to do. One without any of them belongs into the page.
CURES = (
    r"must|allowed|give|choose|use|needs?|needed|pip install|set|try|name|delete it|write the pair anew|are read|is read|ask for|take|save it|leave|"
    r"known are|at most|at least|would fit|begin a new run|remove or rebuild|missing|--force|look whether|only .* can be read|keep it"
)
SAYS_ITS_CURE = re.compile(rf"(?<![\w-])({CURES})(?!\w)")


def template(node: ast.AST) -> str | None:
    """The text of a string as written, … for what is filled in; None if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def strings() -> Iterator[str]:
    """Every string of the sources."""
    for file in SOURCES:
        yield from filter(None, map(template, ast.walk(ast.parse(file.read_text()))))


def messages() -> Iterator[tuple[str, str]]:
    """Every message of an error: what is raised as one, and what config/check.py yields; with its file."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            told: ast.AST | None = None
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS and node.args:
                told = node.args[0]
            elif isinstance(node, ast.Yield) and file.name == "check.py":
                told = node.value
            if told is not None and (text := template(told)):
                yield str(file.relative_to(ROOT)), text


def holds(text: str, quote: str) -> bool:
    """Whether the fixed parts of ``quote`` stand in ``text``, in their order."""
    at = 0
    for part in filter(None, map(str.strip, quote.split("…"))):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def words(text: str) -> int:
    """How many words are fixed."""
    return len(re.findall("[A-Za-z]{2,}", text))


STRINGS = list(dict.fromkeys(strings()))
# A frame around another message ("rank …: …") needs no cure of its own.
SILENT = sorted({(file, text) for file, text in messages() if not SAYS_ITS_CURE.search(text) and words(text) > 1})


@pytest.mark.parametrize("quote", QUOTES)
def test_what_is_quoted_is_in_the_code(quote: str) -> None:
    fixed = sum(len(part.strip()) for part in quote.split("…"))
    assert fixed >= 4
    assert any(holds(string, quote) for string in STRINGS)


@pytest.mark.parametrize(("file", "text"), SILENT)
def test_a_message_says_its_cure_or_is_in_the_page(file: str, text: str) -> None:
    assert any(holds(text, quote) for quote in TOLD if words(quote) > 1), file


def test_there_are_such() -> None:
    assert len(QUOTES) > 120
    assert len(SILENT) > 120
