"""tools/evaluate.py compare: every number of every result in its place, the newest of training's, one picture."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_zebra.evaluation.answers import Answered, Example, tables
from megatron_zebra.evaluation.compare import curves, read_results
from tests.tools.test_evaluate import tool
from tools import evaluate


def perplexity(loss: float, name: str = "held") -> dict[str, Any]:
    return {
        "sets": {name: {"loss": loss, "bits_per_byte": None, "edges": [0, 16, 32], "loss_by_position": [loss, 2.0]}}
    }


def answers(exact: list[float]) -> dict[str, Any]:
    examples = [Example(np.arange(9, dtype=np.int32), [(4, 6)], 16 << n, [0.5], [None]) for n in range(len(exact))]
    return tables(examples, Answered(np.array(exact), np.ones(len(exact)), np.ones(len(exact))), 2)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs; the second has no metrics, and other tasks."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run, documents in (
        (
            one,
            {
                "perplexity": perplexity(3.5),
                "qa-step-00000009": answers([0.0, 0.0]),
                "qa-step-00000010": answers([1.0, 0.0]),
                "perplexity-step-00000010": perplexity(9.0),
            },
        ),
        (
            two,
            {
                "perplexity": perplexity(3.25),
                "retrieval": {"tasks": {"passkey": answers([1.0, 1.0])}},
                "harness": {"tasks": {"fox": {"alias": "fox", "acc,none": 0.25, "acc_stderr,none": 0.1, "n": 3}}},
            },
        ),
    ):
        (run / "evaluation").mkdir(parents=True)
        for name, document in documents.items():
            (run / "evaluation" / f"{name}.json").write_text(json.dumps(document))
    lines = [{"step": step, "loss": 5.0 - step, "consumed_tokens": 1000 * step} for step in (1, 2)]
    lines[0]["valid/held"] = 4.5
    (one / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [one, two]


def test_every_number_in_its_place(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "c.png"
    assert tool("compare", *map(str, runs), "--output", str(output)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["one", "two"],
        ["step", "2", "-"],
        ["training", "loss", "3", "-"],
        ["consumed", "tokens", "2,000", "-"],
        ["valid/held", "4.5000", "-"],
        ["perplexity/held/loss", "3.5000", "3.2500"],
        ["qa/exact", "0.5000", "-"],
        ["qa/exact/16", "1", "-"],
        ["qa/exact/32", "0", "-"],
        ["harness/fox/acc", "-", "0.2500"],
        ["retrieval/passkey/exact", "-", "1"],
        ["retrieval/passkey/exact/16", "-", "1"],
        ["retrieval/passkey/exact/32", "-", "1"],
    ]
    assert lines[-1] == f"picture in {output}"
    assert output.read_bytes()[:4] == b"\x89PNG"
    drawn = curves([read_results(run, run.name) for run in runs])
    assert {title: values.loss.tolist() for title, values in drawn.items()} == {"one": [3.5, 2.0], "two": [3.25, 2.0]}


def test_a_cut_pipe_is_no_fault_of_the_picture(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = builtins.print

    def cut(text: str, *more: Any, **options: Any) -> None:
        if text.startswith("picture in"):
            raise BrokenPipeError
        written(text, *more, **options)

    monkeypatch.setattr(builtins, "print", cut)
    arguments = evaluate.parser().parse_args(["compare", *map(str, runs), "--output", str(tmp_path / "c.png")])
    with pytest.raises(BrokenPipeError):
        evaluate.task_module("compare").run(arguments)
    assert (tmp_path / "c.png").exists()


def test_files_of_one_task_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, loss in (("a", 1.5), ("b", 1.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.json").write_text(json.dumps(perplexity(loss, "x")))
    (tmp_path / "after.json").write_text(json.dumps(perplexity(1.0, "y")))
    files = [str(tmp_path / name) for name in ("a/p.json", "b/p.json", "after.json")]
    assert tool("compare", *files, "--output", str(tmp_path / "c.svg")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        [*files[:2], "after"],
        ["perplexity/x/loss", "1.5000", "1.2500", "-"],
        ["perplexity/y/loss", "-", "-", "1"],
    ]
    drawn = curves([read_results(Path(file), title) for file, title in zip(files, "abc")])
    assert list(drawn) == ["a, x", "b, x", "c, y"]


def test_without_a_loss_by_position_there_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(answers([1.0])))
    assert tool("compare", *map(str, files), "--output", str(tmp_path / "c.png")) == 0
    assert "no picture: " in capsys.readouterr().out
    assert not (tmp_path / "c.png").exists()


def test_bad_input_is_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "half.json").write_text('{"sets": {"a": {"edges": [0, 1], "loss_by_position": [1.0]}}}')
    for given, part in (
        ([], "is one result; two or more"),
        (["no"], "no: no such file or folder"),
        (["empty"], "empty: holds no result; allowed are"),
        (["text.json"], "text.json: is not JSON"),
        (["other.json"], "other.json: is no result of tools/evaluate.py (perplexity, answers"),
        (["half.json"], "half.json: is no whole result of tools/evaluate.py perplexity"),
        (["two", "--output", "c.txt"], "--output c.txt: must end in .png or .svg"),
    ):
        words = [word if word.startswith("-") or word == "c.txt" else str(tmp_path / word) for word in given]
        assert tool("compare", str(runs[0]), *words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert part in err
