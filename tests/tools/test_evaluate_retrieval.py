"""tools/evaluate.py retrieval: from a text to tables, a JSON file and a picture; one line for bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.data.encode import Job
from megatron_zebra.data.preprocess import preprocess
from tests.data.chatting import chat_tokenizer
from tests.tools.test_evaluate import tool
from tests.training.runs import run
from tests.training.test_loop import QUICK


@pytest.fixture(scope="module")
def trained(run_distributed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, two tokenizers, text.txt and the same as a pair."""
    folder = tmp_path_factory.mktemp("trained")
    chat_tokenizer(folder / "tokenizer")
    chat_tokenizer(folder / "plain", None)
    (folder / "text.txt").write_text("It rained for a while. " * 300)
    preprocess(Job([folder / "text.txt"], folder / "tokenizer", folder / "pair"))
    run_distributed(run, 1, folder / "run", QUICK | {"model__vocab_size": 300, "training__steps": 1})
    return folder


def words(trained: Path, output: Path, *more: object, text: str = "text.txt") -> list[str]:
    given = ["--checkpoint", trained / "run", "--text", trained / text, "--device", "cpu", "--output", output]
    if "--tokenizer" not in more:
        given += ["--tokenizer", trained / "tokenizer"]
    return ["retrieval", *map(str, [*given, *more])]


def test_tables_a_file_and_a_picture(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--lengths", 1300, "--depths", 4, "--examples", 2)
    assert tool(*words(trained, tmp_path / "out" / "a.json", *few)) == 0
    said = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (tmp_path / "out" / "a.png").read_bytes()[:4] == b"\x89PNG"
    asked = {name: result["asked"] for name, result in said["tasks"].items()}
    each = [[2, 2, 2, 2]]
    assert asked == {"passkey": each, "needle": each, "needles": [[6, 6, 6, 6]], "variables": each, "words": [[6]]}
    assert said["tasks"]["passkey"]["all"]["exact"] == 0.0  # one step of training
    out = capsys.readouterr().out
    assert "variables\nexact answers" in out
    assert "    1300   0.0      8 " in out
    again = ("--lengths", 400, 300, "--tasks", "passkey", "--depths", 2, "--examples", 1)
    for name, more, text in (("b", (), "text.txt"), ("c", ("--chat",), "text.txt"), ("d", (), "pair")):
        assert tool(*words(trained, tmp_path / name, *again, *more, text=text)) == 0
    b, c, d = (json.loads((tmp_path / name).read_text())["tasks"]["passkey"] for name in "bcd")
    assert b["lengths"] == [300, 400]
    assert b["all"]["loss"] == d["all"]["loss"] != c["all"]["loss"]


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "empty.txt").write_text("")
    chat_tokenizer(trained / "other").joinpath("tokenizer.json").write_text(
        (trained / "tokenizer" / "tokenizer.json").read_text().replace('"<|im_end|>"', '"<|end|>"')
    )
    output = tmp_path / "a.json"
    for given, part in (
        (words(trained, output, "--lengths", 9000), "tokens, but --lengths 9000 takes"),
        (words(trained, output, "--lengths", 50), "--lengths 50: too short for the task passkey, which takes"),
        (words(trained, output, "--lengths", 400), "--lengths 400: too short for the task variables, which takes"),
        (words(trained, output, "--lengths", "0"), "--lengths: must be a whole number from 1 on, not 0"),
        (words(trained, output, "--tasks", "key"), "--tasks: invalid choice: 'key'"),
        (words(trained, output, "--seed", "-1"), "--seed: must be a whole number from 0 on, not -1"),
        (words(trained, output, text="no.txt"), f"--text {trained / 'no.txt'}: no such file or folder"),
        (words(trained, output, text="empty.txt"), "empty.txt: holds no text"),
        (words(trained, output, "--chat", "--tokenizer", trained / "plain"), "its tokenizer has no chat template"),
        (words(trained, output, "--chat-template", "t"), "--chat-template: is for chat; give --chat too"),
        (words(trained, output, "--tokenizer", trained / "none"), "none: no such file"),
        (words(trained, tmp_path / "a.png"), "--output: must not end in .png, as pictures do: it is a JSON file"),
        (words(trained, output, "--tokenizer", trained / "other", text="pair"), "written with another tokenizer"),
    ):
        assert tool(*given) == 2, part
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert part in err
    assert list(tmp_path.iterdir()) == []
    repeat = ("--repeat", "--lengths", 9000, "--tasks", "passkey", "--depths", 1, "--examples", 1)
    assert tool(*words(trained, output, *repeat)) == 0


def test_the_tokenizer_is_found_from_within_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "tokenizer", tmp_path / "run" / "huggingface")
    few = ["--lengths", "300", "--tasks", "passkey", "--depths", "1", "--examples", "1", "--device", "cpu"]
    (step,) = (path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    for place, given in ((step.parent, step.name), (step, ".")):
        monkeypatch.chdir(place)
        assert tool("retrieval", "--checkpoint", given, "--text", str(trained / "text.txt"), *few) == 0
