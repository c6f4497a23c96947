"""tools/evaluate.py answers: from chat JSON lines to a table, a JSON file and a picture; one line for bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.data.qa.build import LongQA, Texts, make_example
from tests.data.chatting import chat_tokenizer, messages, write_lines
from tests.tools.test_evaluate import tool
from tests.training.runs import run
from tests.training.test_loop import QUICK


@pytest.fixture(scope="module")
def tuned(run_distributed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, tokenizer/ and qa.jsonl."""
    from megatron_zebra.data.chat_template import ChatTemplate

    folder = tmp_path_factory.mktemp("tuned")
    template = ChatTemplate(chat_tokenizer(folder / "tokenizer"))
    run_distributed(run, 1, folder / "run", QUICK | {"model__vocab_size": 300, "training__steps": 1})
    texts = Texts(["It rained for a while. " * 300])
    settings = LongQA([600, 900], 6, 2, 1)
    write_lines(folder / "qa.jsonl", *(make_example(settings, number, texts, template) for number in range(6)))
    return folder


def words(tuned: Path, output: Path, data: str = "qa.jsonl") -> list[str]:
    given = ["answers", "--checkpoint", str(tuned / "run"), "--data", str(tuned / data), "--device", "cpu"]
    return [*given, "--tokenizer", str(tuned / "tokenizer"), "--output", str(output)]


def test_a_table_a_file_and_a_picture(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(*words(tuned, tmp_path / "out" / "a.json"), "--depth-bins", "4") == 0
    said = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (tmp_path / "out" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert said["lengths"] == [600, 900]
    assert said["all"]["asked"] == 12 == sum(map(sum, said["asked"]))
    assert said["all"]["exact"] == 0.0  # one step of training
    assert said["all"]["loss"] > 3
    assert sum(of_kind["asked"] for of_kind in said["by_kind"].values()) == 12
    out = capsys.readouterr().out
    assert "     600   0.0      6" in out
    assert "  loss " in out
    assert tool(*words(tuned, tmp_path / "b.json"), "--examples", "2") == 0
    assert json.loads((tmp_path / "b.json").read_text())["all"]["asked"] == 4


def test_conversations_of_another_origin_are_judged_too(tuned: Path, tmp_path: Path) -> None:
    write_lines(
        tuned / "plain.jsonl", {"messages": messages("What is it?", "red")}, {"messages": messages("a", "b", "c", "d")}
    )
    assert tool(*words(tuned, tmp_path / "a.json", "plain.jsonl")) == 0
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["lengths"] == [32]
    assert said["all"]["asked"] == 3
    assert sum(map(sum, said["asked"])) == 0  # no depth is known
    assert said["by_kind"] == {}


def test_bad_input_is_one_line(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tuned / "bad.jsonl", {"messages": messages("a", "b")}, {"messages": messages("a")})
    write_lines(tuned / "none.jsonl")
    for given, part in (
        (words(tuned, tmp_path / "a.json", "no.jsonl"), "no.jsonl: no such file"),
        (words(tuned, tmp_path / "a.json", "bad.jsonl"), "bad.jsonl, line 2: no turn of the assistant"),
        (words(tuned, tmp_path / "a.json", "none.jsonl"), "none.jsonl: holds no conversation"),
        (
            [*words(tuned, tmp_path / "a.json"), "--depth-bins", "0"],
            "--depth-bins: must be a whole number from 1 on, not 0",
        ),
        ([*words(tuned, tmp_path / "a.json"), "--chat-template", str(tmp_path / "t")], "--chat-template"),
    ):
        assert tool(*given) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert part in err
    assert list(tmp_path.iterdir()) == []
