"""tools/evaluate.py: the loss that training's validation found, and one line for bad input."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.writer import PairWriter
from megatron_zebra.errors import run_tool
from tests.convert.models import make
from tests.data.test_indexed import vocabulary
from tests.training.runs import metrics, run
from tests.training.test_loop import QUICK, pair
from tools import evaluate


def tool(*words: str) -> int:
    """The exit code of the tool."""
    sys.argv = ["evaluate.py", *words]
    try:
        run_tool(evaluate.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def trained(run_distributed: Any, tmp_path: Path) -> Path:
    settings = {"data__synthetic__documents": 0, "data__train": [pair(tmp_path / "a", 1)]}
    settings |= {"data__valid": [pair(tmp_path / "b", 1, 10)], "evaluation__interval": 9, "evaluation__rows": 99}
    run_distributed(run, 1, tmp_path / "run", QUICK | settings)
    return tmp_path / "run"


def test_perplexity_is_that_of_the_validation(trained: Path, tmp_path: Path) -> None:
    for checkpoint in (trained, trained / "checkpoints" / "step-00000004"):
        output = tmp_path / "out" / "p.json"
        words = [
            "perplexity",
            "--checkpoint",
            str(checkpoint),
            "--data",
            str(tmp_path / "b"),
            "--sequence-length",
            "48",
        ]
        assert tool(*words, "--device", "cpu", "--output", str(output)) == 0
        found = json.loads(output.read_text())["sets"]["b"]
        assert found["loss"] == pytest.approx(metrics(trained)[-1]["valid/b"], abs=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["bits_per_byte"] is None  # the pair does not know its text
        assert found["edges"] == [0, 16, 32, 48]


def test_the_result_lies_in_the_run_or_beside_the_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "checkpoints" / "hf", "Qwen3", vocab_size=101)
    step = trained / "checkpoints" / "step-00000004"
    for place, given, found in (
        (tmp_path, "run", trained),
        (trained, "checkpoints/step-00000004", trained),
        (trained / "checkpoints", "step-00000004", trained),
        (step, ".", trained),
        (tmp_path, "checkpoints/hf", tmp_path / "checkpoints" / "hf"),
    ):
        monkeypatch.chdir(place)
        words = ["--data", str(tmp_path / "b"), "--rows", "1", "--device", "cpu", "--checkpoint", given]
        assert tool("perplexity", *words) == 0
        assert [file.parent.parent for file in tmp_path.rglob("perplexity.json")] == [found]
        (found / "evaluation" / "perplexity.json").unlink()


def test_the_loss_of_a_model_that_diverged_is_null(tmp_path: Path) -> None:
    theirs = make(tmp_path / "hf", "Qwen3", vocab_size=101)
    theirs.model.norm.weight.data.fill_(math.nan)
    theirs.save_pretrained(tmp_path / "hf")
    data, output = pair(tmp_path / "a", 1, 5), tmp_path / "p.json"
    words = ["--checkpoint", str(tmp_path / "hf"), "--data", data, "--device", "cpu", "--output", str(output)]
    assert tool("perplexity", *words) == 0
    assert "NaN" not in output.read_text()
    assert json.loads(output.read_text())["sets"]["a"]["loss"] is None
    assert tool("compare", str(output), str(output), "--output", str(tmp_path / "c.png")) == 0


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    data = ["--data", str(tmp_path / "b"), "--device", "cpu"]
    for words, part in [
        (["--checkpoint", str(tmp_path / "no"), *data], "no such file or folder"),
        (["--checkpoint", str(tmp_path / "empty"), *data], "holds no model"),
        (["--checkpoint", str(trained), "--data", str(tmp_path / "no")], "no.idx"),
        (["--checkpoint", str(trained), *data, "--rows", "0"], "--rows: must be a whole number from 1 on, not 0"),
        (["--checkpoint", str(trained), *data, "--stride", "4000"], "--stride 4000: must not be above --sequence"),
        (["--checkpoint", str(trained), *data, "--tp", "2"], "--tp 2 x --cp 1 x --pp 1: must divide the number of pro"),
        (["--checkpoint", str(trained), *data, "--output", str(tmp_path / "file" / "x")], "cannot be written"),
        (
            ["--checkpoint", str(trained), *data, "--output", str(tmp_path / "empty")],
            "empty: cannot be written (Is a dir",
        ),
    ]:
        assert tool("perplexity", *words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert part in err
    assert not (trained / "evaluation").exists()
    assert not (tmp_path / "empty.tmp").exists()


def test_a_context_longer_than_every_text_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = int(np.diff(IndexedPair(tmp_path / "b").document_starts(0, 11)).max())
    words = ["perplexity", "--checkpoint", str(trained), "--data", str(tmp_path / "b"), "--device", "cpu"]
    for length, warned in ((longest, False), (longest + 1, True)):
        assert tool(*words, "--sequence-length", str(length), "--output", str(tmp_path / "p.json")) == 0
        line = f"b: its longest document has {longest} tokens, fewer than --sequence-length {length}; nothing is judged"
        assert (line in capsys.readouterr().err) == warned


def test_data_without_a_target_is_an_error(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PairWriter(tmp_path / "single", vocabulary()) as writer:
        writer.add(np.arange(5), [1] * 5)
        writer.finish()
    words = ["--data", str(tmp_path / "single"), "--device", "cpu", "--output", str(tmp_path / "p.json")]
    assert tool("perplexity", "--checkpoint", str(trained), *words) == 2
    assert f"error: --data {tmp_path / 'single'}: has no target" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_rows_longer_than_the_data_are_cut_to_it(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    words = ["--sequence-length", str(10**11), "--device", "cpu", "--output", str(output)]
    assert tool("perplexity", "--checkpoint", str(trained), "--data", str(tmp_path / "b"), *words) == 0
    found = json.loads(output.read_text())["sets"]["b"]
    assert found["edges"][-1] == IndexedPair(tmp_path / "b").tokens.size


def test_a_result_without_a_picture_is_a_result(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "config.yaml").unlink()  # the pictures need it
    words = ["--data", str(tmp_path / "b"), "--device", "cpu"]
    assert tool("perplexity", "--checkpoint", str(trained), *words) == 0
    assert "warning: no pictures: " in capsys.readouterr().err
    assert (trained / "evaluation" / "perplexity.json").exists()


def test_sets_of_one_name_are_both_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    pair(tmp_path / "other" / "b", 2, 10)
    both = [str(tmp_path / "b"), str(tmp_path / "other" / "b")]
    output = tmp_path / "p.json"
    words = ["--sequence-length", "48", "--rows", "2", "--device", "cpu", "--output", str(output)]
    assert tool("perplexity", "--checkpoint", str(trained), "--data", *both, *words) == 0
    assert list(json.loads(output.read_text())["sets"]) == both


def test_a_hugging_face_folder_has_the_perplexity_of_transformers(tmp_path: Path) -> None:
    theirs = make(tmp_path / "hf", "Qwen3", vocab_size=101)
    data = pair(tmp_path / "a", 1, 5)
    output = tmp_path / "p.json"
    words = ["perplexity", "--checkpoint", str(tmp_path / "hf"), "--data", data, "--sequence-length", "4000"]
    assert tool(*words, "--device", "cpu", "--output", str(output)) == 0
    found = json.loads(output.read_text())["sets"]["a"]
    read, total, targets = IndexedPair(data), 0.0, 0
    starts = [read.document_start(document) for document in range(read.documents)]
    for start, stop in itertools.pairwise([*starts, read.tokens.size]):
        ids = torch.from_numpy(read.tokens[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            total += theirs(ids, labels=ids).loss.item() * (ids.numel() - 1)
        targets += ids.numel() - 1
    assert found["targets"] == targets
    assert found["loss"] == pytest.approx(total / targets, abs=1e-5)
