"""docs/megatron.md says of each flag which key it is here, or that there is none (that keys exist: test_keys.py)."""

import pytest

from megatron_zebra.config.help import all_keys
from tests.docs.pages import ROOT, named, prose, quoted, rows

PAGE = prose(ROOT / "docs/megatron.md")
ROWS = [row for row in rows(PAGE) if any(word.startswith("--") for word in quoted(row[0]))]
KEYS = {key.path for key in all_keys()}


def test_many_flags_are_covered_each_once() -> None:
    flags = [word.split()[0] for row in ROWS for word in quoted(row[0])]
    assert len(set(flags)) >= 200
    again = {flag for flag in flags if flags.count(flag) > 1}
    assert again <= {"--window-attn-skip-freq", "--context-parallel-size", "--recompute-granularity", "--load"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_flag_has_a_key_or_a_reason(row: list[str]) -> None:
    _, keys, _ = row
    assert keys == "-" or keys.startswith("always") or keys == "`deepspeed`" or named(keys)


def test_what_is_said_not_to_be_offered_has_no_key() -> None:
    for word in ("fp8", "expert", "moe", "dropout", "ring", "async", "compile"):
        assert not [key for key in KEYS if word in key], word
