"""The pages of the documentation, and what is in them."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_zebra.config.sections import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"([a-z]+(?:\.[a-z0-9_]+)+)(?:: (.+))?")
_FILES = (".jsonl", ".safetensors")  # files whose name begins as a section's does
_SEPARATOR = re.compile(r"[|\s:-]+")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after the fence, and its lines."""

    page: str
    kind: str
    text: str


def blocks(page: Path, kind: str) -> list[Block]:
    """The fenced blocks of ``page`` whose words are ``kind``."""
    name = str(page.relative_to(ROOT))
    return [
        Block(name, words.strip(), text) for words, text in _FENCE.findall(page.read_text()) if words.strip() == kind
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of all Markdown tables in ``text``, heads left out."""
    lines = text.splitlines()
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("|") and _SEPARATOR.fullmatch(line)}
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        for number, line in enumerate(lines)
        if line.startswith("|") and not _SEPARATOR.fullmatch(line) and number not in heads
    ]


def quoted(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def named(text: str) -> list[tuple[str, str | None]]:
    """Keys of the configuration between backticks, as ``section.key`` or ``section.key: value``."""
    found = [_KEY.fullmatch(word) for word in quoted(text)]
    return [
        (match[1], match[2])
        for match in found
        if match
        and match[1].split(".")[0] in Config.model_fields
        and not match[1].endswith(_FILES)
        and "…" not in match[0]
    ]
