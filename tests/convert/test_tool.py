"""The command lines of tools/convert_checkpoint.py, and the pattern that they choose."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.checkpoint import catalog, verify
from megatron_zebra.convert.families import understand
from megatron_zebra.convert.pattern import with_pattern
from megatron_zebra.convert.source import open_model
from megatron_zebra.errors import UserError
from tests.convert.models import SMALL, make
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def tool(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The tool in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    try:
        convert_checkpoint.run_tool(convert_checkpoint.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_there_and_back_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf", "Llama")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"odd_key": 3}))
    options = ["--layer-group-size", 2, "--window-size", 7]
    assert tool(monkeypatch, "from-hf", "--hf", tmp_path / "hf", "--output", tmp_path / "c", *options) == 0
    told = capsys.readouterr()
    assert "odd_key" in told.err
    assert f"written to {tmp_path / 'c'}" in told.out
    assert tool(monkeypatch, "to-hf", "--checkpoint", tmp_path / "c", "--output", tmp_path / "out") == 0
    assert tool(monkeypatch, "verify", "--checkpoint", tmp_path / "c", "--hf", tmp_path / "out") == 0
    assert "256 random tokens, window of 7 + 1 keys, fp32: the largest difference" in capsys.readouterr().out
    assert tool(monkeypatch, "inspect", "--checkpoint", tmp_path / "c") == 0
    page = capsys.readouterr().out
    for words in (
        "step 0, weights alone",
        "█░█░█",
        "type llama",
        "llama        no: cannot have local layers",
        "cwm          yes",
    ):
        assert words in page


def test_verify_finds_a_window_that_is_off_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf", "Mistral", sliding_window=8)
    assert tool(monkeypatch, "verify", "--checkpoint", tmp_path / "hf", "--hf", tmp_path / "hf") == 0
    make(tmp_path / "other", "Mistral", sliding_window=7)
    assert tool(monkeypatch, "verify", "--checkpoint", tmp_path / "hf", "--hf", tmp_path / "other") == 1
    assert "NOT equal to 0.0001 of it; the first position that differs is 7" in capsys.readouterr().out
    too_short = ["--checkpoint", tmp_path / "hf", "--hf", tmp_path / "hf", "--length", 8]
    assert tool(monkeypatch, "verify", *too_short) == 2
    assert "more than 8 tokens are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["from-hf", "--hf", "/nowhere", "--output", "x"], "--hf /nowhere: no such file or folder"),
        (["to-hf", "--checkpoint", "tests", "--output", "x"], "tests: holds no model; allowed are"),
        (["inspect", "--checkpoint", "tests"], "tests: holds no model"),
        (
            ["to-hf", "--checkpoint", "tests", "--output", "x", "--max-shard-size", "5XB"],
            "a number of bytes, KB, MB or GB",
        ),
        (["from-hf", "--hf", "tests", "--output", "x/"], "ends without a name"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_with_kept_files_is_verified_and_pruned_like_any_other(tmp_path: Path) -> None:
    from megatron_zebra.convert.from_hf import from_hf

    make(tmp_path / "hf", "Llama")
    for step in (1, 2):
        from_hf(tmp_path / "hf", tmp_path / f"checkpoints/step-{step:08d}")
    assert verify(tmp_path / "checkpoints/step-00000001") == []
    assert open_model(tmp_path).folder.name == "step-00000002"
    assert catalog.prune(tmp_path / "checkpoints", keep_last=1) == ["step-00000001"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def pattern(*options: Any, **config: Any) -> tuple[str, int]:
    arch = understand(Path("c"), {"model_type": "mistral", **SMALL, "sliding_window": None, **config}).architecture
    arch = with_pattern(arch, *options)
    return "".join("G" if kind == "global" else "l" for kind in arch.layer_kinds), arch.window_size


def test_the_pattern_is_the_rule_or_a_list() -> None:
    assert pattern(None, None, None) == ("GGGGG", 512)
    assert pattern(2, 7, None) == ("GlGlG", 7)
    assert pattern(2, 7, "first-of-group") == ("GlGlG", 7)
    assert pattern(1, None, None) == ("GGGGG", 512)
    assert pattern(None, 7, "0,3") == ("GllGl", 7)
    assert pattern(None, 7, "local, local,global,full,local") == ("llGGl", 7)
    assert pattern(None, 9, None, sliding_window=8) == ("lllll", 9)
    assert pattern(2, None, None, sliding_window=8) == ("GlGlG", 7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((2, None, None), "--window-size is missing"),
        ((None, 7, None), "no layer is local"),
        ((0, 7, None), "--layer-group-size 0: must be 1 or more"),
        ((2, 0, None), "--window-size 0: must be 1 or more"),
        ((2, 7, "0,1"), "--layer-group-size says it too"),
        ((None, 7, "first-of-group"), "needs --layer-group-size"),
        ((None, 7, "0,5"), "layer 5 does not exist, the model has 5"),
        ((None, 7, "global,local"), "names 2 kinds, the model has 5 layers"),
        ((None, 7, "every other"), "allowed are first-of-group"),
    ],
)
def test_patterns_that_cannot_be(options: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        pattern(*options)


def test_a_checkpoint_that_does_not_know_its_length_asks_for_it(tmp_path: Path) -> None:
    from megatron_zebra.checkpoint import layout
    from megatron_zebra.convert.from_hf import from_hf
    from megatron_zebra.convert.to_hf import to_hf

    make(tmp_path / "hf", "Llama")
    from_hf(tmp_path / "hf", tmp_path / "c")
    index = layout.read_index(tmp_path / "c")
    index.metadata["architecture"]["max_length"] = None
    (tmp_path / "c/index.json").write_bytes(layout.encode_index(replace(index)))
    with pytest.raises(UserError, match="give --max-length"):
        to_hf(tmp_path / "c", tmp_path / "out")
    to_hf(tmp_path / "c", tmp_path / "out", max_length=99)
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 99
