"""Examples of long question answering: a stretch of real text, facts planted in it, and questions about some of them.

An example is a function of the seed and its number, so neither the workers nor how many examples are made changes it
(but for the depth, whose strata depend on their number).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.permutation import Permutation, derive_key
from megatron_zebra.data.qa.facts import KINDS, Fact, make_facts
from megatron_zebra.data.qa.words import Split
from megatron_zebra.errors import UserError

_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n")  # what lies between sentences or paragraphs
_LINE = re.compile(r"\n+")
_SPARSE = 1000  # characters a sentence may have on average; above that, lines do as well (code, tables)
_INTRODUCTIONS = (
    "Read the text and answer the question that follows it.",
    "Here is a text. A question about it comes at the end.",
    "Please read this carefully; I shall ask you about it.",
)
_CHARACTERS = 8  # of text looked at for each token wanted: more than a token has, but for rare texts
_FEWEST = 3  # characters a token has at least, on average
_TRIES = 100


@dataclass(frozen=True)
class LongQA:
    """What to make: ``examples`` conversations, whose token counts reach for ``lengths`` in turn and never exceed them,
    each with ``questions`` about facts among ``distractors`` more of the same shape."""

    lengths: Sequence[int]
    examples: int
    questions: int = 1
    distractors: int = 3
    seed: int = 0
    split: Split = "train"


def boundaries(text: str) -> list[tuple[int, int]]:
    """Where sentences and paragraphs (lines, where there are few) end and the next ones begin, ascending."""
    found = [match.span() for match in _SENTENCE.finditer(text)]
    if len(found) * _SPARSE < len(text):
        found = sorted({*found, *(match.span() for match in _LINE.finditer(text))})
    return found


class Texts:
    """Documents that stretches are taken from: each in proportion to its length."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = documents
        self._ends = np.cumsum([len(text) for text in documents])

    def __len__(self) -> int:
        return len(self._documents)

    def draw(self, generator: np.random.Generator, tokens: int) -> str:
        """Text from a random boundary on, enough for ``tokens`` tokens unless the document ends."""
        place = int(generator.integers(self._ends[-1]))
        text = self._documents[int(np.searchsorted(self._ends, place, "right"))]
        start = int(generator.integers(max(1, len(text) - _FEWEST * tokens)))
        part = text[start : start + _CHARACTERS * tokens]
        first = next((stop for _, stop in boundaries(part)), 0) if start else 0
        return part[first:]


def held_out(documents: Sequence[str], split: Split, every: int) -> list[str]:
    """The documents of a split: every ``every``-th is for valid alone (0: all are of this split)."""
    if not every:
        return list(documents)
    return [text for number, text in enumerate(documents) if (number % every == every - 1) == (split == "valid")]


def depth_of(settings: LongQA, example: int, question: int) -> float:
    """Where in the text a fact belongs, from 0 to 1: each length's facts have depths in strata of equal width."""
    length = example % len(settings.lengths)
    of_length = -(-(settings.examples - length) // len(settings.lengths))
    strata = of_length * settings.questions
    key = derive_key("long qa depth", settings.seed, settings.split, length)
    place = Permutation(strata, key)(example // len(settings.lengths) * settings.questions + question)
    jitter = np.random.Generator(np.random.PCG64(derive_key(key, place))).random()
    return float((place + jitter) / strata)


def make_example(settings: LongQA, number: int, texts: Texts, template: ChatTemplate) -> dict[str, Any]:
    """{"messages": [...], "meta": {"length", "tokens", "questions": [{"kind", "depth", "answer"}, ...]}} of one example.

    ``depth`` is where the fact stands in the text that was built, in characters.

    Raises:
        UserError: no document is long enough, or the length is too short for the facts.
    """
    length = settings.lengths[number % len(settings.lengths)]
    generator = np.random.Generator(np.random.PCG64(derive_key("long qa", settings.seed, settings.split, number)))
    kind = KINDS[int(generator.integers(len(KINDS)))]
    introduction = _INTRODUCTIONS[int(generator.integers(len(_INTRODUCTIONS)))]
    count = settings.questions + settings.distractors
    depths = [depth_of(settings, number, question) for question in range(settings.questions)]
    depths += generator.random(settings.distractors).tolist()
    for _ in range(_TRIES):
        text = texts.draw(generator, length)
        if template.special_in(text):
            continue
        starts, room = template.token_starts(text), length - 2
        if starts.size <= room:
            continue
        facts = make_facts(generator, kind, count, settings.split, text)
        while room > length // 4:
            document, places = plant(_cut(text, int(starts[room])), facts, depths)
            messages = _conversation(introduction, document, facts[: settings.questions])
            size = template.encode(messages, f"example {number}").tokens.size
            if size <= length:
                asked = [
                    {"kind": fact.kind, "depth": round(place, 4), "answer": fact.answer}
                    for fact, place in zip(facts[: settings.questions], places)
                ]
                return {"messages": messages, "meta": {"length": length, "tokens": int(size), "questions": asked}}
            room -= size - length
        raise UserError(
            f"--lengths {length}: too few tokens for {count} facts (--questions {settings.questions}, --distractors "
            f"{settings.distractors}) and a text around them"
        )
    raise UserError(
        f"no text of {length} tokens was found in {_TRIES} places of {len(texts)} documents; give longer documents or "
        "shorter --lengths"
    )


def plant(text: str, facts: Sequence[Fact], depths: Sequence[float]) -> tuple[str, list[float]]:
    """The text with the facts put where sentences begin, nearest to ``depths``; and the depths at which they then stand."""
    candidates = np.array(sorted({0, len(text), *(stop for _, stop in boundaries(text))}))
    wanted = np.array(depths) * len(text)
    chosen = candidates[np.abs(candidates[None, :] - wanted[:, None]).argmin(1)]
    parts: list[str] = []
    begins = [0] * len(facts)
    done = written = 0
    for number in sorted(range(len(facts)), key=lambda n: (chosen[n], depths[n])):
        place = int(chosen[number])
        before = text[done:place]
        glue = "" if not (before or parts) or (before or parts[-1])[-1].isspace() else " "
        parts += [before, glue]
        begins[number] = written + len(before) + len(glue)
        sentence = facts[number].statement + ("" if place == len(text) else " ")
        parts.append(sentence)
        written, done = begins[number] + len(sentence), place
    document = "".join([*parts, text[done:]])
    return document, [begin / max(1, len(document) - len(fact.statement)) for begin, fact in zip(begins, facts)]


def _cut(text: str, stop: int) -> str:
    """The text up to ``stop`` at most: to the end of a sentence or line close before it, else of a word."""
    ends = [start for start, _ in boundaries(text[:stop]) if start > stop - stop // 20]
    if ends:
        return text[: ends[-1]]
    space = text.rfind(" ", 0, stop)
    return text[: space if space > 0 else stop]


def _conversation(introduction: str, document: str, asked: Sequence[Fact]) -> list[dict[str, str]]:
    messages = []
    for number, fact in enumerate(asked):
        content = fact.question if number else f"{introduction}\n\n{document}\n\n{fact.question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": fact.answer}]
    return messages
