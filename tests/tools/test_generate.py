"""tools/generate.py: what it prints is what the model says; one line for bad input."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_zebra
from megatron_zebra.convert.source import open_model
from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.errors import run_tool
from megatron_zebra.inference.load import stop_ids
from tests.convert.models import make
from tests.data.chatting import chat_tokenizer, with_bos
from tools import generate

PROMPT = "It rained for a while."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random model, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer(folder)
    size = load_tokenizer(folder).vocab_size
    make(folder, "Cwm", vocab_size=size, sliding_window=8, max_position_embeddings=256, eos_token_id=None)
    return folder


def said(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object, typed: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the tool."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code = 0
    try:
        run_tool(generate.main)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def expected(folder: Path, ids: list[int], count: int) -> str:
    """The text of ``count`` greedy tokens, up to the end of document."""
    tokenizer = load_tokenizer(folder)
    new = megatron_zebra.load(folder, "cpu").generate([ids], count)[0, len(ids) :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.eod_id)] if tokenizer.eod_id in new else new)


def test_the_text_goes_on_as_the_model_does_and_ends_at_a_stop_string(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = expected(folder, load_tokenizer(folder).encode(PROMPT), 24)
    words = ["--checkpoint", folder, "--prompt", PROMPT, "--max-new-tokens", 24, "--device", "cpu"]
    assert said(monkeypatch, capsys, *words, "--prefill-chunk", 3) == (0, f"{PROMPT}{whole}\n", "")
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    assert said(monkeypatch, capsys, *words, "--stop", "never met", "--stop", stop)[1] == f"{PROMPT}{cut}\n"


def test_a_token_that_the_tokenizer_puts_before_a_text_is_put_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import transformers

    other = with_bos(shutil.copytree(folder, tmp_path / "bos"))
    ids = transformers.AutoTokenizer.from_pretrained(other)(PROMPT).input_ids
    assert ids == [1, *load_tokenizer(folder).encode(PROMPT)]
    words = ["--checkpoint", other, "--prompt", PROMPT, "--max-new-tokens", 12, "--device", "cpu"]
    for more, given in (([], ids), (["--no-bos"], ids[1:])):
        assert said(monkeypatch, capsys, *words, *more)[1] == f"{PROMPT}{expected(folder, given, 12)}\n"


def test_a_text_ends_at_a_token_that_either_file_names(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for name, ends in (("config.json", 7), ("generation_config.json", [8, 9])):
        file = tmp_path / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    source, tokenizer = open_model(tmp_path / "model"), load_tokenizer(folder)
    assert stop_ids(source, tokenizer) == {7, 8, 9, tokenizer.eod_id}


def test_several_prompts_are_each_told_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompts = [PROMPT, "A"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, out, _ = said(monkeypatch, capsys, "--checkpoint", folder, *words, "--max-new-tokens", 9, "--device", "cpu")
    each = [expected(folder, load_tokenizer(folder).encode(prompt), 9) for prompt in prompts]
    told = "".join(f"== {number}\n{prompt}{more}\n" for number, (prompt, more) in enumerate(zip(prompts, each)))
    assert (code, out) == (0, told)


def test_a_talk_remembers_what_was_said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[list[dict[str, str]]] = []
    real = ChatTemplate.prompt

    def prompt(self: ChatTemplate, messages: Any, where: str) -> list[int]:
        asked.append([dict(message) for message in messages])
        return real(self, messages, where)

    monkeypatch.setattr(ChatTemplate, "prompt", prompt)
    words = ["--checkpoint", folder, "--chat", "--system", "Be brief.", "--max-new-tokens", 5, "--device", "cpu"]
    code, out, _ = said(monkeypatch, capsys, *words, typed="Hello.\nAnd you?\n\n")
    assert code == 0
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    answer = expected(folder, real(ChatTemplate(folder), first, ""), 5)
    assert asked == [
        first,
        [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And you?"}],
    ]
    assert out.startswith(f"{answer}\n")


def test_a_talk_without_any_input_ends(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(io, "StringIO", lambda _: None)  # as where stdin is closed
    assert said(monkeypatch, capsys, "--checkpoint", folder, "--chat", "--device", "cpu") == (0, "", "")


@pytest.mark.parametrize("person", [True, False])
def test_a_slip_does_not_cost_a_person_the_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, person: bool
) -> None:
    typed = io.StringIO("Hello.\nWhat is <|im_end|>?\nHello again.\n")
    monkeypatch.setattr(typed, "isatty", lambda: person)
    monkeypatch.setattr(io, "StringIO", lambda _: typed)
    words = ["--checkpoint", folder, "--chat", "--max-new-tokens", 3, "--device", "cpu"]
    code, out, err = said(monkeypatch, capsys, *words)
    assert err == "error: this conversation, message 3: its text holds the special token '<|im_end|>'\n"
    assert (code, out.count("> ")) == ((0, 4) if person else (2, 0))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_message_that_is_no_text_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, errors: str
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8", errors)
    monkeypatch.setattr(io, "StringIO", lambda _: typed)
    code, _, err = said(monkeypatch, capsys, "--checkpoint", folder, "--chat", "--device", "cpu")
    assert code == 2
    assert err.startswith("error: --chat: a message")
    assert err.endswith("must be UTF-8 text\n")


def test_a_stop_string_that_is_never_met_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    whole = expected(folder, load_tokenizer(folder).encode(PROMPT), 9)
    words = ["--checkpoint", folder, "--max-new-tokens", 9, "--device", "cpu", "--prompt", PROMPT]
    _, out, err = said(monkeypatch, capsys, *words, "--stop", "never met")
    assert out == f"{PROMPT}{whole}\n"
    assert err.startswith("warning: --stop: none was met; ended at")
    _, _, err = said(monkeypatch, capsys, *words, "--prompt", "A", "--stop", whole[3:])
    assert err.startswith("warning: --stop: none was met in 1 of 2 texts")
    assert err.count("\n") == 1


def test_a_talk_takes_a_template_and_ends_where_it_ends_a_turn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|im_start|>\n{% endfor %}")
    prompt = ChatTemplate(folder, template).prompt([{"role": "user", "content": "Hello."}], "")
    tokenizer = load_tokenizer(folder)
    new = megatron_zebra.load(folder, "cpu").generate([prompt], 9)[0, len(prompt) :].tolist()
    words = ["--checkpoint", folder, "--chat", "--chat-template", template, "--max-new-tokens", 9, "--device", "cpu"]
    ends: list[set[int]] = []
    monkeypatch.setattr(ChatTemplate, "end_of_turn", lambda _: ends[-1])
    for end, count in (({new[4]}, new.index(new[4])), (set(), 9)):
        ends.append(end)
        code, out, _ = said(monkeypatch, capsys, *words, typed="Hello.\n\n")
        assert code == 0
        assert out == tokenizer.decode(new[:count]) + "\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", "a", "--max-new-tokens", str(10**12)], "1 sequence of up to 1,000,000,000,001 tokens"),
        (["--prompt", "a", "--seed", "-1"], "seed -1: must be"),
        (["--prompt", "a", "--system", "b"], "--system: is for a talk; give --chat too"),
        (["--chat", "--chat-template", "none.jinja"], "--chat-template none.jinja: cannot be read"),
        (["--prompt", ""], "--prompt '': is empty"),
        (["--prompt-file", "/dev/null"], "--prompt-file /dev/null: is empty"),
        (["--prompt", "a\udcff"], "--prompt 'a\\udcff': must be UTF-8 text"),
        (["--prompt", "a", "--stop", "\udcff"], "--stop '\\udcff': must be UTF-8 text"),
        (["--prompt", "a", "--temperature", "x"], "--temperature: invalid float value: 'x'"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--prompt", "a", "--stop", ""], "--stop: must not be empty"),
        (["--prompt", "a", "--top-p", "2"], "--top-p 2.0: must be above 0 and at most 1"),
        (["--prompt-file", "none.txt"], "--prompt-file none.txt: cannot be read"),
        (["--prompt", "a", "--device", "cuda"], "--device cuda: no CUDA device here (allowed: auto, cpu)"),
        (["--prompt", "a", "--tokenizer", "none"], "none: no such file"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = said(monkeypatch, capsys, "--checkpoint", folder, "--device", "cpu", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1


def test_a_checkpoint_without_a_tokenizer_asks_for_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make(tmp_path / "bare", "Llama")
    capsys.readouterr()
    code, _, err = said(monkeypatch, capsys, "--checkpoint", tmp_path / "bare", "--prompt", "a", "--device", "cpu")
    assert code == 2
    assert err.startswith("error: --tokenizer: must be given, since none is beside the model")
    assert len(err.splitlines()) == 1
