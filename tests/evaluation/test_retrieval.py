"""Retrieval: each example holds one answer where it is said to be, and what judges agrees with who reads the text."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zebra.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.answers import Example, judge
from megatron_zebra.evaluation.retrieval import haystack as haystacks
from megatron_zebra.evaluation.retrieval.build import HEAD, Frame, divide, frame_of, make_example
from megatron_zebra.evaluation.retrieval.haystack import Haystack, open_haystack
from megatron_zebra.evaluation.retrieval.run import Retrieval, example_maker, examples_of, retrieve
from megatron_zebra.evaluation.retrieval.tasks import EVERYWHERE, TASKS, Counts
from megatron_zebra.evaluation.tasks import retrieval as command
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.model.architecture import resolve
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group
from megatron_zebra.training.build import build_model
from tests.data.chatting import CHATML, LLAMA, chat_tokenizer, with_bos
from tests.data.corpus import patient
from tests.training.cases import small

CPU = torch.device("cpu")
STATEMENT = re.compile(
    r" (The pass key is \d+\. Remember it|One of the numbers of \w+ is \d+|The variable \w+ is set to [\w ]+|A voice calls \w+)\."
)
PROSE = " ".join(f"In year {n} it rained on the hills, and nobody came." for n in range(3000))
LENGTH = {"sentencepiece": 1000, "huggingface": 1600}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    (folder / "text.txt").write_text(PROSE)
    chat_tokenizer(folder / "huggingface")
    train_tokenizer(TokenizerJob([folder / "text.txt"], 300, folder / "sentencepiece"))
    return folder


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request: Any, folder: Path) -> Tokenizer:
    return load_tokenizer(folder / request.param)


def maker(
    tokenizer: Tokenizer, folder: Path, seed: int = 0, template: ChatTemplate | None = None
) -> Callable[..., Example]:
    haystack = open_haystack([str(folder / "text.txt")], tokenizer, 4000, False)
    frame = frame_of(tokenizer, template, bos=True)

    def make(task: str, number: int, stratum: int, strata: int = 5, length: int = LENGTH[tokenizer.kind]) -> Example:
        return make_example(
            task,
            number,
            length,
            stratum,
            strata,
            haystack=haystack,
            tokenizer=tokenizer,
            frame=frame,
            counts=Counts(),
            seed=seed,
        )

    return make


def solve(text: str) -> str:
    """The answer to what ``text`` asks at its end, by reading it; the text so far without the lead of the answer."""
    text, _, question = text.rpartition("\n\n")
    if found := re.search(r"pass key is (\d+)", text):
        return found[1]
    if asked := re.search(r"numbers of (\w+), in", question):
        return ", ".join(re.findall(rf"numbers of {asked[1]} is (\d+)", text))
    if asked := re.search(r"variable (\w+) stand for", question):
        value = asked[1]
        assigned = dict(re.findall(r"variable (\w+) is set to (?:the variable )?(\w+)\.", text))
        while value in assigned:
            value = assigned[value]
        return value
    assert "voice call" in question
    return ", ".join(word for word, _ in Counter(re.findall(r"voice calls (\w+)", text)).most_common(3))


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_as_long_as_asked_and_says_the_answer_once(tokenizer: Tokenizer, folder: Path, task: str) -> None:
    make = maker(tokenizer, folder)
    length = LENGTH[tokenizer.kind]
    for stratum in range(1 if task in EVERYWHERE else 5):
        for number in range(3):
            example = make(task, number, stratum, 1 if task in EVERYWHERE else 5)
            assert example.tokens.size == length == example.length
            assert example.turns[-1][1] == length
            assert all(stop == start for (_, stop), (start, _) in zip(example.turns, example.turns[1:]))
            prompt = tokenizer.decode(example.tokens[: example.turns[0][0]].tolist())
            answers = [tokenizer.decode(example.tokens[start:stop].tolist()) for start, stop in example.turns]
            assert prompt.startswith(HEAD)
            assert len(answers) == {"needles": 3, "words": 3}.get(task, 1) == len(example.depths)
            text, _, asked = prompt.rpartition("\n\n")
            if not prompt.endswith('"'):  # a password in quotes
                assert [answer[: 2 if n else 1] for n, answer in enumerate(answers)] == [" ", ", ", ", "][
                    : len(answers)
                ]
            words = [answer.lstrip(", ") for answer in answers]
            assert [text.count(word) for word in words] == ([8, 4, 2] if task == "words" else [1] * len(words))
            assert not any(word in asked for word in words)
            if task != "needle":
                assert solve(prompt) == ", ".join(words)
                assert STATEMENT.sub("", text[len(HEAD) :]) in PROSE  # nothing else was added or taken away


def test_what_the_tokenizer_puts_before_a_text_comes_first_and_counts(folder: Path, tmp_path: Path) -> None:
    plain, bos = load_tokenizer(folder / "huggingface"), load_tokenizer(with_bos(chat_tokenizer(tmp_path / "bos")))
    base, same = (maker(tokenizer, folder)("passkey", 0, 2).tokens.tolist() for tokenizer in (plain, bos))
    assert same[0] == 1 != base[0]
    assert len(same) == len(base)
    assert same[1:100] == base[:99]
    settings = Retrieval([str(folder / "text.txt")], ["passkey"], [LENGTH["huggingface"]], bos=False)
    asked = [example_maker(settings, tokenizer)("passkey", 0, 1600, 2, 5).tokens for tokenizer in (plain, bos)]
    assert asked[0].tolist() == asked[1].tolist()
    chat = ChatTemplate(tmp_path / "bos")  # the template puts there what belongs there
    assert frame_of(bos, chat, bos=True).prefix == ()


@pytest.mark.parametrize("task", sorted(set(TASKS) - EVERYWHERE))
def test_the_answer_is_at_the_asked_depth(tokenizer: Tokenizer, folder: Path, task: str) -> None:
    make, strata = maker(tokenizer, folder), 5
    seen: Counter[int] = Counter()
    for stratum in range(strata):
        for number in range(4):
            example = make(task, number, stratum, strata, 3900)
            tokens = example.tokens.tolist()
            text = tokenizer.decode(tokens[: example.turns[0][0]]).rpartition("\n\n")[0]
            for (start, stop), depth in zip(example.turns, example.depths):
                assert depth is not None
                answer = tokenizer.decode(tokens[start:stop]).lstrip(", ")
                before, after = (len(STATEMENT.sub("", part)) for part in text[len(HEAD) :].split(answer))
                assert before / (before + after) == pytest.approx(depth, abs=0.06)  # of characters, not of tokens
                seen[int(depth * strata)] += 1
            assert task == "needles" or int(example.depths[0] * strata) == stratum  # type: ignore[operator]
            assert example.depths == sorted(example.depths)  # type: ignore[type-var]
    assert len(set(seen.values())) == 1, seen  # as many in every stratum
    assert set(seen) == set(range(strata))


def test_more_distractors_of_the_same_shape_have_other_answers(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "huggingface")
    make = maker(tokenizer, folder)
    for number in range(5):
        text = tokenizer.decode(make("needles", number, 0).tokens.tolist()).rpartition("\n\n")[0]
        stated = re.findall(r"One of the numbers of (\w+) is (\d+)", text)
        assert len(stated) == len({value for _, value in stated}) == 6
        assert len({name for name, _ in stated}) == 4
        text = tokenizer.decode(make("variables", number, 0).tokens.tolist())
        assert len(re.findall(r"is set to \d+\.", text)) == 4
        assert len(re.findall(r"is set to the variable", text)) == 12


def test_the_seed_decides_and_nothing_else_does(tokenizer: Tokenizer, folder: Path) -> None:
    make, again, other = (maker(tokenizer, folder, seed) for seed in (0, 0, 1))
    for task in TASKS:
        made = make(task, 2, 0, 1).tokens.tolist()
        assert made == again(task, 2, 0, 1).tokens.tolist()
        assert made != other(task, 2, 0, 1).tokens.tolist()
        assert made != make(task, 3, 0, 1).tokens.tolist()


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_chat_is_asked_with_the_template(folder: Path, tmp_path: Path, template: str) -> None:
    chat = ChatTemplate(chat_tokenizer(tmp_path / "t", template))
    tokenizer = load_tokenizer(tmp_path / "t")
    example = maker(tokenizer, folder, template=chat)("passkey", 0, 1)
    said = tokenizer.decode(example.tokens.tolist())
    content = said[said.index(HEAD) : said.index("What is the pass key?") + len("What is the pass key?")]
    answer = tokenizer.decode(example.tokens[slice(*example.turns[0])].tolist())
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"The pass key is{answer}"}]
    whole = tokenizer.decode(chat.encode(turns, "").tokens.tolist())
    assert whole.startswith(said)
    assert whole[len(said) :].strip() in ("<|im_end|>", "<|endoftext|>")
    if template == CHATML:
        special = [tokenizer.token_id(name) for name in ("<|im_start|>", "<|im_end|>")]
        assert [token for token in example.tokens.tolist() if token in special] == [*special, special[0]]
    assert example.tokens.size == LENGTH["huggingface"]


class Reader:
    """A model that reads the last ``reach`` tokens before the answer and says what they tell, or 9s."""

    def __init__(self, tokenizer: Tokenizer, reach: int) -> None:
        self.tokenizer, self.reach, self.head = tokenizer, reach, self
        self.tp = Group.alone("tp")

    def states(self, inputs: torch.Tensor, positions: torch.Tensor, segments: Any) -> torch.Tensor:
        ids = inputs.tolist()
        text = self.tokenizer.decode(ids)
        lead = "The pass key is"
        prompt = text[: text.rindex(lead) + len(lead)]
        start = next(n for n in range(len(ids) - 12, len(ids)) if self.tokenizer.decode(ids[:n]) == prompt)
        seen = self.tokenizer.decode(ids[max(0, start - self.reach) : start])
        found = re.search(r"pass key is (\d+)\. Remember", seen)
        said = self.tokenizer.encode(f" {found[1] if found else '99999'}")
        ahead = [*ids[1:], 0]
        ahead[start - 1 : start - 1 + len(said)] = said
        return torch.tensor(ahead)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(states, self.tokenizer.vocab_size).float()


def found_by(grid: Grid, folder: Path, reach: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder / "huggingface")
    settings = Retrieval([str(folder / "text.txt")], ["passkey"], [800, 1200], depths=5, examples=3)
    assert examples_of(settings) == 30
    model: Any = Reader(tokenizer, reach)
    return retrieve(model, settings, example_maker(settings, tokenizer), grid)["passkey"]


def test_who_reads_all_finds_all_and_who_forgets_finds_what_is_near(run_distributed: Any, folder: Path) -> None:
    everything = run_distributed(found_by, 1, folder, 10_000)[0]
    assert everything["exact"] == [[1.0] * 5] * 2
    assert everything["asked"] == [[3] * 5] * 2
    both = run_distributed(found_by, 2, folder, 500)
    assert both[0] == both[1]
    for row in both[0]["exact"]:
        assert row == sorted(row)
        assert (row[0], row[-1]) == (0.0, 1.0)
    assert sum(both[0]["exact"][0]) > sum(both[0]["exact"][1])


def test_exact_is_what_generation_says(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "huggingface")
    config = small(model__vocab_size=300)
    arch = resolve(config.model, 300, 1024)
    decoder = build_model(config, arch, CPU).eval()
    model, make = LanguageModel(arch, decoder), maker(tokenizer, folder)
    examples, wanted = [], []
    for number in range(8):
        example = make("needles", number, 0, length=600)
        prompt = example.tokens[: example.turns[0][0]].tolist()
        answer = model.generate([prompt], 600 - len(prompt), prefill_chunk=100)[0, len(prompt) :].tolist()
        if number % 2:
            start, stop = example.turns[number % 3]
            answer[start - len(prompt)] = (answer[start - len(prompt)] + 1) % 300
        tokens = np.array(prompt + answer, np.int32)
        examples.append(replace(example, tokens=tokens))
        for start, stop in example.turns:
            said = model.generate([tokens[:start].tolist()], stop - start)[0, start:].tolist()
            wanted.append(float(said == tokens[start:stop].tolist()))
    assert 4 < sum(wanted) < 24
    assert judge(decoder, examples, CPU).exact.tolist() == wanted


@patient
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 12), st.floats(0, 1, exclude_max=True))
def test_a_place_is_in_its_stratum_and_where_a_sentence_ends_if_one_does(
    ends: list[bool], strata: int, depth: float
) -> None:
    room, stratum = len(ends), int(depth * strata)
    place = Haystack(np.zeros(room, np.int32), np.array(ends)).place(depth, room, strata)
    inside = [n + 1 for n, end in enumerate(ends) if end and min((n + 1) * strata // room, strata - 1) == stratum]
    if inside:
        assert place in inside
        assert abs(place - int(depth * room)) == min(abs(n - int(depth * room)) for n in inside)
    else:
        assert place == int(depth * room)


@patient
@given(st.lists(st.text("ab. 1\n", min_size=1, max_size=8), min_size=1, max_size=4))
def test_parts_of_a_text_are_cut_and_nothing_is_lost(parts: list[str]) -> None:
    def encode(text: str) -> list[int]:  # runs of one character are one token
        return [ord(run[0][0]) * 100 + len(run[0]) for run in re.finditer(r"(.)\1*", text, re.DOTALL)]

    cut = divide(encode, parts)
    whole = encode("a" + "".join(parts))
    together = [token for part in cut for token in part]
    assert len(cut) == len(parts)
    assert together == whole[len(whole) - len(together) :]
    assert len(whole) - len(together) <= 1


def test_a_text_is_files_or_a_pair_and_may_repeat(folder: Path, tmp_path: Path) -> None:
    from megatron_zebra.data.encode import Job
    from megatron_zebra.data.preprocess import preprocess

    tokenizer = load_tokenizer(folder / "huggingface")
    (tmp_path / "in").mkdir()
    for name, text in (("a", "It rained. Nobody came.\n"), ("b", "All was well.")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    preprocess(Job([tmp_path / "in"], folder / "huggingface", tmp_path / "pair"))
    of_files, of_pair = (open_haystack([str(tmp_path / name)], tokenizer, 10, False) for name in ("in", "pair"))
    text = tokenizer.decode(of_files.tokens.tolist())
    assert text == "It rained. Nobody came.\nAll was well."
    assert of_files.tokens.tolist() == of_pair.tokens.tolist()
    ended = [tokenizer.decode(of_files.tokens[: n + 1].tolist()) for n in np.flatnonzero(of_files.ends)]
    assert (ended[0], ended[-1]) == ("It rained.", text)
    more = open_haystack([str(tmp_path / "in")], tokenizer, 300, True)
    assert tokenizer.decode(more.tokens.tolist()).startswith(text + text)
    assert more.tokens.size == 300
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text("")
    with pytest.raises(UserError, match="in: holds no text"):
        open_haystack([str(tmp_path / "in")], tokenizer, 10, True)


def test_a_longer_context_changes_nothing_for_a_shorter_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_zebra.data.encode import Job
    from megatron_zebra.data.preprocess import preprocess

    monkeypatch.setattr(haystacks, "_READ", 600)
    monkeypatch.setattr(haystacks, "_CONTEXTS", 3)
    tokenizer = load_tokenizer(folder / "huggingface")
    lines = [f"It rained on day {n}.\n" for n in range(600)]
    (tmp_path / "long.txt").write_text("".join(lines))
    (tmp_path / "short.txt").write_text("".join(lines[:10]))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    preprocess(Job([tmp_path / "lines.jsonl"], folder / "huggingface", tmp_path / "pair"))
    for text, repeat in (("long.txt", False), ("pair", False), ("short.txt", True)):
        short, long = (open_haystack([str(tmp_path / text)], tokenizer, n, repeat) for n in (250, 900))
        assert short.tokens.size < long.tokens.size
        for seed in range(20):
            of_short, of_long = (one.draw(np.random.default_rng(seed), 250) for one in (short, long))
            assert of_short.tokens.tolist() == of_long.tokens.tolist()


def test_what_does_not_fit_is_said(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "huggingface")
    make = maker(tokenizer, folder)
    with pytest.raises(UserError, match=r"--lengths 90: too short for the task passkey, which takes \d+ tokens beside"):
        make("passkey", 0, 0, length=90)
    with pytest.raises(
        UserError, match=r"--text: has \d+ tokens, but --lengths 9999999 takes 99\d+ of it; give more text"
    ):
        make("passkey", 0, 0, length=9_999_999)
    numbers = " ".join(map(str, range(10_000, 100_000)))
    frame = Frame(tokenizer.encode)
    haystack = Haystack(np.array(tokenizer.encode(numbers), np.int32), np.zeros(1 << 20, bool))
    with pytest.raises(UserError, match="no name or number was found in 1000 tries that the text does not hold"):
        make_example(
            "passkey",
            0,
            haystack.tokens.size,
            0,
            1,
            haystack=haystack,
            tokenizer=tokenizer,
            frame=frame,
            counts=Counts(),
            seed=0,
        )


def test_the_command_line_knows_the_tasks() -> None:
    assert tuple(TASKS) == command.TASKS
