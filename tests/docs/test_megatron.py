"""docs/megatron.md names keys that exist, with values that they take."""

import re

import pytest

from megatron_zebra.config.help import all_keys
from megatron_zebra.config.load import load_config, parse_words
from tests.docs.pages import ROOT, quoted, rows

PAGE = (ROOT / "docs/megatron.md").read_text()
ROWS = [row for row in rows(PAGE) if any(word.startswith("--") for word in quoted(row[0]))]
KEYS = {key.path for key in all_keys()}
SECTIONS = {path.split(".")[0] for path in KEYS}
NAMED = re.compile(r"([a-z]+(?:\.[a-z0-9_]+)+)(?:: (.+))?")


def named(text: str) -> list[tuple[str, str | None]]:
    """Keys between backticks, with the value if one is given."""
    found = [NAMED.fullmatch(word) for word in quoted(text)]
    return [(match[1], match[2]) for match in found if match and match[1].split(".")[0] in SECTIONS]


def test_many_flags_are_covered_each_once() -> None:
    flags = [word.split()[0] for row in ROWS for word in quoted(row[0])]
    assert len(set(flags)) >= 200
    again = {flag for flag in flags if flags.count(flag) > 1}
    assert again <= {"--window-attn-skip-freq", "--context-parallel-size", "--recompute-granularity", "--load"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_flag_has_a_key_or_a_reason(row: list[str]) -> None:
    _, keys, _ = row
    assert keys == "-" or keys.startswith("always") or keys == "`deepspeed`" or named(keys)


@pytest.mark.parametrize(("key", "value"), sorted(set(named(PAGE)), key=str))
def test_keys_exist_and_take_their_values(key: str, value: str | None) -> None:
    assert key in KEYS | {path.rsplit(".", 1)[0] for path in KEYS}
    if value is not None:
        load_config(None, parse_words([f"--{key}", value]).overrides)


def test_what_is_said_not_to_be_offered_has_no_key() -> None:
    for word in ("fp8", "expert", "moe", "dropout", "ring", "async", "compile"):
        assert not [key for key in KEYS if word in key], word
