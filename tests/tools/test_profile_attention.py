"""tools/profile_attention.py: a table, a picture, and one line for bad input."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.errors import run_tool
from tests.tools.test_evaluate import trained  # noqa: F401
from tools import profile_attention


def tool(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["profile_attention.py", *words])
    try:
        run_tool(profile_attention.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_layers_are_measured_and_drawn(trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:  # noqa: F811
    words = ["--checkpoint", str(trained), "--data", str(tmp_path / "b"), "--sequence-length", "24", "--rows", "2"]
    more = ["--windows", "3", "8", "--keep", "2", "--device", "cpu", "--output", str(tmp_path / "out" / "profile")]
    assert tool(monkeypatch, *words, *more) == 0
    said = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert (tmp_path / "out" / "profile.png").read_bytes()[:4] == b"\x89PNG"
    assert f"--pattern {','.join(map(str, said['keep']))}" in capsys.readouterr().out
    assert len(said["keep"]) == 2
    for window, total in zip(said["mass"], said["mass_without_sinks"]):
        assert all(0 <= w <= m <= 1 for layer, other in zip(window, total) for m, w in zip(layer, other))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--windows", "30"], "--windows 30: must be below --sequence-length 24 - 1"),
        (["--windows", "0", "--keep", "1"], "--windows 0: must be 1 or more"),
        (["--windows", "3", "--keep", "99"], "--keep 99: the model has 2 layers"),
    ],
)
def test_bad_input_is_one_line(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    words: list[str],
    line: str,
) -> None:
    base = ["--checkpoint", str(trained), "--data", str(tmp_path / "b"), "--sequence-length", "24", "--device", "cpu"]
    assert tool(monkeypatch, *base, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
