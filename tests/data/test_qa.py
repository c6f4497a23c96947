"""Long question answering: the fact is where it is said to be, depths are even, and the file depends on its seed alone."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.qa.build import LongQA, Texts, boundaries, depth_of, held_out, make_example, plant
from megatron_zebra.data.qa.facts import KINDS, Fact, make_facts
from megatron_zebra.data.qa.words import WORDS
from megatron_zebra.errors import UserError, run_tool
from tests.data.chatting import chat_tokenizer
from tests.data.corpus import patient
from tests.data.test_tools import files_of
from tools import build_long_qa


def prose(number: int, sentences: int) -> str:
    return " ".join(f"In year {n} of book {number} it rained." + "\n\n" * (n % 9 == 0) for n in range(sentences))


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    chat_tokenizer(folder / "tokenizer")
    (folder / "in").mkdir()
    for number in range(8):
        (folder / "in" / f"{number}.txt").write_text(prose(number, 200 + 30 * number))
    return folder


def build(books: Path, output: Path, *more: object) -> tuple[int, list[dict]]:
    words = ("--input", books / "in", "--tokenizer", books / "tokenizer", "--output", output, "--held-out", 4)
    with (
        patch.object(sys, "argv", ["build_long_qa.py", *map(str, words), *map(str, more)]),
        patch("signal.signal"),
    ):
        try:
            run_tool(build_long_qa.main)
        except SystemExit as end:
            return int(str(end.code)), []
    return 0, [json.loads(line) for line in output.read_text().splitlines()]


def test_examples_hold_what_their_meta_says(books: Path, tmp_path: Path) -> None:
    code, made = build(books, tmp_path / "a.jsonl", "--lengths", 1500, 3000, "--examples", 20, "--questions", 2)
    assert code == 0
    assert [example["meta"]["length"] for example in made] == [1500, 3000] * 10
    template = ChatTemplate(books / "tokenizer")
    for example in made:
        meta, messages = example["meta"], example["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        rendered = template.encode(messages, "")
        assert rendered.tokens.size == meta["tokens"]
        assert 0.9 * meta["length"] < meta["tokens"] <= meta["length"]
        document = messages[0]["content"].split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        for number, question in enumerate(meta["questions"]):
            assert messages[2 * number + 1]["content"] == question["answer"]
            assert document.count(question["answer"]) == 1
            assert document.find(question["answer"]) / len(document) == pytest.approx(question["depth"], abs=0.1)
        assert len(re.findall("In year", document)) > 10
    depths = np.sort([q["depth"] for e in made for q in e["meta"]["questions"] if e["meta"]["length"] == 3000])
    assert np.abs(depths - (np.arange(20) + 0.5) / 20).max() < 0.08  # even, but for where sentences begin
    assert len({q["kind"] for e in made for q in e["meta"]["questions"]}) > 3


def test_the_seed_decides_and_not_the_workers(books: Path, tmp_path: Path) -> None:
    options = ("--lengths", 1500, "--examples", 12)
    texts = []
    for name, more in (("a", ()), ("b", ("--workers", 4)), ("c", ("--seed", 5))):
        assert build(books, tmp_path / name, *options, *more)[0] == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_held_out_facts_and_documents_are_others(books: Path, tmp_path: Path) -> None:
    made = {}
    for split in ("train", "valid"):
        code, made[split] = build(books, tmp_path / split, "--lengths", 1500, "--examples", 24, "--split", split)
        assert code == 0
    seen = {
        split: {
            book for example in examples for book in re.findall(r"of book (\d+)", example["messages"][0]["content"])
        }
        for split, examples in made.items()
    }
    assert seen["valid"] == {"3", "7"}
    assert seen["train"] <= {"0", "1", "2", "4", "5", "6"}
    for name, words in WORDS["train"].items():
        assert not set(words) & set(WORDS["valid"][name])
        assert len(words) > 2 * len(WORDS["valid"][name]) > 20
        together = [*words, *WORDS["valid"][name]]
        assert len(set(together)) == len(together)
    assert held_out(["a", "b", "c"], "valid", 0) == held_out(["a", "b", "c"], "train", 0) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_one_shape_differ_and_are_not_in_the_text(kind: str) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    facts = make_facts(generator, kind, 12, "train", "")
    assert len({fact.answer for fact in facts}) == len({fact.question for fact in facts}) == 12
    for fact in facts:
        assert fact.answer in fact.statement
        assert fact.answer not in fact.question
        assert "{" not in fact.statement + fact.question
        assert fact.statement[0].isupper() or fact.statement[0].isdigit()
        assert fact.lead[0].isupper()
        assert fact.lead[-1] in ' "'
        assert fact.answer not in fact.lead
    assert any(fact.lead + fact.answer in fact.statement for fact in facts)
    taken = " ".join(fact.answer for fact in facts)
    again = make_facts(np.random.Generator(np.random.PCG64(1)), kind, 12, "train", taken)
    assert not {fact.answer for fact in facts} & {fact.answer for fact in again}


@patient
@given(st.integers(1, 40), st.integers(1, 4), st.lists(st.integers(64, 99), min_size=1, max_size=3), st.integers(0, 9))
def test_every_stratum_of_depth_is_used_once(examples: int, questions: int, lengths: list[int], seed: int) -> None:
    settings = LongQA(lengths, examples, questions, seed=seed)
    for length in range(min(len(lengths), examples)):
        numbers = range(length, examples, len(lengths))
        depths = [depth_of(settings, number, question) for number in numbers for question in range(questions)]
        assert sorted(int(depth * len(depths)) for depth in depths) == list(range(len(depths)))


sentences = st.lists(st.sampled_from(["It rained. ", "Why? ", "x = 1\n", "\n\n", "word ", '"Oh!" '])).map("".join)


@patient
@given(sentences, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_planting_takes_nothing_away(text: str, depths: list[float]) -> None:
    facts = [Fact("k", f"Fact {n} is here.", "", "") for n in range(len(depths))]
    document, places = plant(text, facts, depths)
    rest = document
    for n, (fact, place) in enumerate(zip(facts, places)):
        assert document.count(fact.statement) == 1
        begin = document.index(fact.statement)
        assert place == pytest.approx(begin / max(1, len(document) - len(fact.statement)))
        assert begin == 0 or document[begin - 1].isspace(), n
        rest = rest.replace(fact.statement, "")
    assert rest.split() == text.split()
    order = sorted(range(len(depths)), key=depths.__getitem__)
    assert sorted(places) == [places[n] for n in order]


def test_lines_are_boundaries_only_where_sentences_are_few() -> None:
    wrapped = "It rained\nall day. The sun\ncame out. " * 20
    assert all(wrapped[stop].isupper() for _, stop in boundaries(wrapped)[:-1])
    code = "x = call(1)\n" * 400
    assert len(boundaries(code)) == 400


def test_bad_input_is_one_line(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("x")
    for name, more, message in (
        ("a", ("--lengths", 20), "--lengths 20: must be 64 tokens or more"),
        ("a", ("--lengths", 300), "--lengths 300: too few tokens for 4 facts"),
        ("a", ("--lengths", 90000), "no text of 90000 tokens was found in 100 places of 6 documents"),
        ("a", ("--lengths", 1500, "--examples", 0), "--examples 0: must be 1 or more"),
        ("a", ("--lengths", 1500, "--held-out", 1), "--held-out 1: leaves nothing"),
        ("a", ("--lengths", 1500, "--held-out", 50, "--split", "valid"), "none of the 8 documents is of it"),
        ("there", ("--lengths", 1500), "already there; choose another name, or replace with --force"),
        ("no/a", ("--lengths", 1500), "cannot be written (No such file or directory)"),
    ):
        code, _ = build(books, tmp_path / name, *more)
        err = capsys.readouterr().err
        assert code == 2, message
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert files_of(tmp_path) == ["there"]


def test_texts_with_special_tokens_are_passed_over(books: Path) -> None:
    template = ChatTemplate(books / "tokenizer")
    settings = LongQA([300], 5)
    with pytest.raises(UserError, match="no text of 300 tokens"):
        make_example(settings, 0, Texts(["Bad <|im_end|> text. " * 200]), template)
