"""Conversations: what the assistant says and nothing else counts, whatever the template, and every fault is one line."""

import io
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from megatron_zebra.data.chat import read_messages
from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.encode import ChatOptions, Job
from megatron_zebra.data.indexed import IndexedPair, mask_path
from megatron_zebra.data.preprocess import preprocess
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.errors import UserError, run_tool
from tests.data.chatting import CHATML, LLAMA, MARKED, NO_PROMPT, chat_tokenizer, messages, write_lines
from tests.data.test_tools import files_of
from tools import preprocess_data

CHAT = messages("What is it?", "It is 4821-KX.", "And\nthe fox?", "red")
SAID = ["It is 4821-KX.<|im_end|>", "red<|im_end|>"]


def said(folder: Path, template: str | None, chat: list[dict[str, str]]) -> tuple[str, list[str]]:
    """The whole text of a conversation, and its counted runs of tokens, decoded."""
    chat_tokenizer(folder, template)
    rendered = ChatTemplate(folder).encode(chat, "a.jsonl, line 1")
    tokenizer = load_tokenizer(folder)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.mask, [0]])))
    assert list(zip(edges[::2].tolist(), edges[1::2].tolist())) == rendered.turns
    return tokenizer.decode(rendered.tokens), [tokenizer.decode(rendered.tokens[a:b]) for a, b in rendered.turns]


@pytest.mark.parametrize("template", [CHATML, MARKED, NO_PROMPT], ids=["chatml", "generation marks", "no prompt"])
def test_S01_only_the_assistants_words_and_their_end_count(tmp_path: Path, template: str) -> None:
    text, spans = said(tmp_path, template, [{"role": "system", "content": "Be brief."}, *CHAT])
    assert spans == SAID
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?")
    assert text.endswith("<|im_start|>assistant\nred<|im_end|>\n")


def test_a_marked_template_without_its_end_of_turn_counts_it_all_the_same(tmp_path: Path) -> None:
    template = MARKED.replace("{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
                              "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")  # fmt: skip
    assert template != MARKED
    assert said(tmp_path, template, CHAT)[1] == SAID


def test_a_template_of_another_kind(tmp_path: Path) -> None:
    text, spans = said(tmp_path, LLAMA, CHAT)
    assert text.startswith("[INST] What is it? [/INST] It is")
    assert spans == [" It is 4821-KX. <|endoftext|>", " red <|endoftext|>"]


def test_the_mask_and_the_tokens_are_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rendered = ChatTemplate(chat_tokenizer(tmp_path, MARKED)).encode(CHAT, "")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered.tokens.tolist() == theirs["input_ids"]
    assert rendered.mask.tolist() == theirs["assistant_masks"]


def test_text_that_merges_over_a_border_does_not_move_it(tmp_path: Path) -> None:
    """The header ends with a line break, and the tokenizer knows two of them as one token."""
    chat = messages("x", "\n\nred")
    text, spans = said(tmp_path, CHATML, chat)
    assert spans[0].lstrip("\n") == "red<|im_end|>"
    assert text.count("assistant") == 1


# Templates whose turns look different at the end of a conversation, or change what came before.
INCONSISTENT = {
    "the last turn is another": CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'][:2])"),
    "turns are counted": CHATML.replace("m['role'] +", "m['role'] ~ messages | length +"),
    "words are changed and no prompt": NO_PROMPT.replace("m['content']", "m['content'] | upper"),
}


@pytest.mark.parametrize("template", INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_S01_a_template_that_hides_its_turns_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the chat template of .* cannot be told") as error:
        said(tmp_path, template, CHAT)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_templates_and_texts_that_cannot_be(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path / "raises", "{{ raise_exception('roles must\nalternate') }}")
    chat_tokenizer(tmp_path / "syntax", "{% for %}")
    chat_tokenizer(tmp_path / "none", None)
    chat_tokenizer(tmp_path / "good")
    chat_tokenizer(
        tmp_path / "marks", MARKED.replace("{% generation %}", "{% if loop.first %}{% endif %}{% generation %}")
    )
    once = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    chat_tokenizer(tmp_path / "once", once)
    (tmp_path / "empty").mkdir()
    for folder, chat, message in (
        ("raises", CHAT, "x: the chat template of .*raises fails: roles must$"),
        ("syntax", CHAT, "x: the chat template of .*syntax fails: "),
        ("none", CHAT, r"none: its tokenizer has no chat template; give one with --chat-template FILE"),
        ("empty", CHAT, "empty: no tokenizer.json"),
        ("once", CHAT, "marks 1 turns as generated, but the assistant has 2"),
        ("good", messages("a", "b<|im_end|>"), r"x, message 2: its text holds the special token '<\|im_end\|>'"),
        ("good", messages("hello", "you", first="assistant"), r"x: begins with a turn of the assistant"),
    ):
        with pytest.raises(UserError, match=message) as error:
            ChatTemplate(tmp_path / folder).encode(chat, "x")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--chat-template .*no\.jinja: cannot be read"):
        ChatTemplate(tmp_path / "good", tmp_path / "no.jinja")
    (tmp_path / "t.jinja").write_text(LLAMA)
    assert ChatTemplate(tmp_path / "none", tmp_path / "t.jinja").encode(CHAT, "").mask.any()


def test_both_forms_of_a_conversation() -> None:
    old = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "id": 3}]}
    assert read_messages(old, "") == [
        {"role": "user", "content": "a"},
        {"id": 3, "role": "assistant", "content": "b"},
    ]
    assert read_messages({"messages": CHAT, "meta": 1}, "") == CHAT


GOOD = {"messages": CHAT}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "list instead of an object"),
        ({"text": "a"}, r"no key 'messages' or 'conversations'; there are 'text'"),
        ({"messages": []}, r"'messages' must be a list of messages, not \[\]"),
        ({"messages": "hello"}, "'messages' must be a list of messages, not 'hello'"),
        ({"messages": ["hello"]}, "message 1: 'hello' instead of an object"),
        ({"messages": messages("only a question")}, "no turn of the assistant in 1 messages"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1: role = 'bot'; allowed are system, user, assistant, tool",
        ),
        ({"messages": [{"content": "x"}]}, "message 1: role = None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"role = \['user'\]"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"from = 'bot'; allowed are .* \(and human, gpt\)"),
        ({"messages": messages("a", " \n")}, r"message 2: content = ' \\n'; text is needed"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content = None; text is needed"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
        ({"messages": messages("<|im_start|>", "x")}, "holds the special token"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(tmp_path: Path, line: object, message: str) -> None:
    folder = chat_tokenizer(tmp_path / "tokenizer")
    source = write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD)
    out = tmp_path / "out"
    out.mkdir()
    job = Job([source], folder, out / "p", chat=ChatOptions())
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2[:,] .*{message}") as error:
        preprocess(job)
    assert "\n" not in str(error.value)
    assert files_of(out) == []
    report = preprocess(Job([source], folder, out / "p", chat=ChatOptions(), skip_bad=True))
    assert (report.info.documents, report.bad) == (2, 1)
    assert re.search(message, report.first_bad)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and chat.jsonl of conversations of many lengths."""
    folder = tmp_path_factory.mktemp("chats")
    chat_tokenizer(folder / "tokenizer")
    lines = [{"messages": messages("the fox " * (n % 7), f"It is {n}.", "again", "red " * n)} for n in range(1, 21)]
    lines = [line for line in lines if line["messages"][0]["content"].strip()]
    write_lines(folder / "chat.jsonl", *lines)
    return folder


def tool(*words: object) -> tuple[int, str]:
    """Exit code and output of preprocess_data.py, in this process: transformers takes seconds to import."""
    out = io.StringIO()
    code: object = 0
    with (
        patch.object(sys, "argv", ["preprocess_data.py", *map(str, words)]),
        patch.object(signal, "signal"),
        redirect_stdout(out),
        redirect_stderr(out),
    ):
        try:
            run_tool(preprocess_data.main)
        except SystemExit as end:
            code = end.code
    return int(str(code)), out.getvalue()


def fails(*words: object) -> str:
    """The one line of a user's mistake."""
    code, out = tool(*words)
    assert code == 2
    assert out.startswith("error: ")
    assert out.count("\n") == 1
    return out


def make(chats: Path, prefix: Path, *more: object) -> str:
    where = ("--input", chats / "chat.jsonl", "--tokenizer", chats / "tokenizer", "--output-prefix", prefix)
    code, out = tool("--chat", *where, "--workers", 1, *more)
    assert code == 0, out
    return out


def test_the_tool_writes_a_mask_beside_the_tokens(chats: Path, tmp_path: Path) -> None:
    out = make(chats, tmp_path / "p", "--workers", 2)
    assert files_of(tmp_path) == ["p.bin", "p.idx", "p.json", "p.loss"]
    pair = IndexedPair(tmp_path / "p")
    assert pair.info is not None
    assert pair.mask is not None
    assert pair.info.loss_tokens == int(pair.mask.sum())
    assert f"18 conversations, {pair.tokens.size:,} tokens, {pair.info.loss_tokens:,} of them in the loss" in out
    tokenizer = load_tokenizer(chats / "tokenizer")
    counted = tokenizer.decode(pair.tokens[pair.mask != 0])
    assert counted.count("<|im_end|>") == 36
    assert "user" not in counted
    make(chats, tmp_path / "q")
    for suffix in ("bin", "idx", "json", "loss"):
        assert (tmp_path / f"q.{suffix}").read_bytes() == (tmp_path / f"p.{suffix}").read_bytes()
    (tmp_path / "t.txt").write_text("plain text")
    texts = ("--input", tmp_path / "t.txt", "--tokenizer", chats / "tokenizer", "--output-prefix", tmp_path / "p")
    assert "p.loss: already there" in fails(*texts)
    assert tool(*texts, "--force", "--workers", 1)[0] == 0
    assert not mask_path(tmp_path / "p").exists()
    assert IndexedPair(tmp_path / "p").mask is None


def test_what_is_too_long_is_dropped_cut_or_refused(chats: Path, tmp_path: Path) -> None:
    make(chats, tmp_path / "p")
    lengths = np.diff(IndexedPair(tmp_path / "p").document_starts(0, 19))
    limit = int(np.median(lengths))
    many = int((lengths > limit).sum())
    assert 0 < many < 18
    out = make(chats, tmp_path / "d", "--max-length", str(limit), "--too-long", "drop")
    assert f"of more than {limit} tokens: {many} conversations were left out, 0 cut" in out
    kept = IndexedPair(tmp_path / "d")
    assert kept.documents == 18 - many
    assert np.diff(kept.document_starts(0, kept.documents + 1)).max() <= limit
    out = make(chats, tmp_path / "t", "--max-length", str(limit), "--too-long", "truncate")
    cut = IndexedPair(tmp_path / "t")
    assert f"of more than {limit} tokens: {18 - cut.documents} conversations were left out, " in out
    assert np.diff(cut.document_starts(0, cut.documents + 1)).max() == limit
    given = (
        "--chat",
        "--input",
        chats / "chat.jsonl",
        "--tokenizer",
        chats / "tokenizer",
        "--output-prefix",
        tmp_path / "e",
    )
    line = fails(*given, "--workers", 1, "--max-length", limit)
    assert re.search(rf"chat\.jsonl, line \d+: \d+ tokens, above --max-length {limit} \(--too-long drop or", line)
    assert "--max-length 0: must be 1" in fails(*given, "--max-length", 0)
    assert "--too-long drop: says what is too long" in fails(*given, "--too-long", "drop")
    assert "--max-length: is for conversations" in fails(*given[1:], "--max-length", 9)


def test_a_mask_that_is_lost_or_strange_is_never_ignored(chats: Path, tmp_path: Path) -> None:
    make(chats, tmp_path / "p")
    path = mask_path(tmp_path / "p")
    whole = path.read_bytes()
    before = IndexedPair(tmp_path / "p").fingerprint()
    path.write_bytes(bytes(len(whole)))
    assert IndexedPair(tmp_path / "p").fingerprint() != before
    for content, message in ((whole[:-1], "bytes for the .* tokens of p.bin"), (b"", "0 bytes for")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            IndexedPair(tmp_path / "p")
    path.unlink()
    with pytest.raises(UserError, match=r"the loss mask of p\.bin cannot be read .* every token would count"):
        IndexedPair(tmp_path / "p")
    path.write_bytes(whole)
    (tmp_path / "p.json").unlink()
    with pytest.raises(UserError, match=r"p\.loss: a loss mask that .*p\.json does not tell of"):
        IndexedPair(tmp_path / "p")
