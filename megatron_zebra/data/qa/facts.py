"""Made-up facts of several kinds, each a sentence, a question and its answer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_zebra.data.qa.words import WORDS, Split
from megatron_zebra.errors import UserError

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_TRIES = 1000


@dataclass(frozen=True)
class Fact:
    """``statement`` stands in the text, ``answer`` is the part of it that ``question`` asks for, and that ``lead``, the
    beginning of a statement, goes on with."""

    kind: str
    statement: str
    question: str
    answer: str
    lead: str = ""


class _Draw:
    """Seeded choices among the words of a split."""

    def __init__(self, generator: np.random.Generator, split: Split) -> None:
        self._generator, self._words = generator, WORDS[split]

    def number(self, low: int, high: int) -> int:
        """low .. high."""
        return int(self._generator.integers(low, high + 1))

    def of(self, values: list[str] | tuple[str, ...] | str) -> str:
        return values[self.number(0, len(values) - 1)]

    def word(self, name: str) -> str:
        return self.of(self._words[name])

    def person(self) -> str:
        return f"{self.word('first')} {self.word('last')}"

    def code(self) -> str:
        letters = "".join(self.of(_LETTERS) for _ in range(self.number(2, 3)))
        digits = str(self.number(1000, 99999))
        return f"{letters}-{digits}" if self.number(0, 1) else f"{digits}-{letters}"


@dataclass(frozen=True)
class _Kind:
    subject: Callable[[_Draw], str]
    answer: Callable[[_Draw], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


_KINDS = {
    "code": _Kind(
        lambda draw: f"the {draw.word('adjective')} {draw.word('noun')} locker",
        lambda draw: draw.code(),
        (
            "The access code of {subject} is {answer}.",
            "To open {subject}, one has to enter {answer}.",
            "Whoever needs {subject} should remember the code {answer}.",
        ),
        ("What is the access code of {subject}?", "Which code opens {subject}?"),
    ),
    "person": _Kind(
        lambda draw: f"the {draw.word('noun')} club of {draw.word('town')}",
        lambda draw: draw.person(),
        (
            "The chair of {subject} is {answer}.",
            "For some years now {subject} has been led by {answer}.",
            "{answer} was elected to lead {subject}.",
        ),
        ("Who leads {subject}?", "What is the name of the person at the head of {subject}?"),
    ),
    "place": _Kind(
        lambda draw: f"the {draw.word('adjective')} {draw.word('thing')}",
        lambda draw: f"the {draw.word('room')} in {draw.word('town')}",
        (
            "Since last winter {subject} has been kept in {answer}.",
            "Visitors who want to see {subject} will find it in {answer}.",
            "They hid {subject} in {answer}.",
        ),
        ("Where is {subject} kept?", "In which place can one find {subject}?"),
    ),
    "date": _Kind(
        lambda draw: f"the {draw.word('adjective')} {draw.word('event')} of {draw.word('town')}",
        lambda draw: f"{draw.number(1, 28)} {draw.of(_MONTHS)} {draw.number(1700, 2050)}",
        (
            "The date of {subject} is {answer}.",
            "It was written down that {subject} falls on {answer}.",
            "Everybody in the region knows {answer} as the day of {subject}.",
        ),
        ("On what date is {subject}?", "What is the date of {subject}?"),
    ),
    "number": _Kind(
        lambda draw: f"the {draw.word('noun')} society of {draw.word('town')}",
        lambda draw: f"{draw.number(1000, 99999):,}",
        (
            "At the last count {subject} had {answer} members.",
            "The number of members of {subject} is {answer}.",
            "No fewer than {answer} people belong to {subject}.",
        ),
        ("How many members does {subject} have?", "What is the number of members of {subject}?"),
    ),
    "password": _Kind(
        lambda draw: draw.person(),
        lambda draw: f"{draw.word('adjective')} {draw.word('noun')}",
        (
            'The password of {subject} is "{answer}".',
            'When asked for a password, {subject} always says "{answer}".',
            'Only the words "{answer}" will prove that a message is from {subject}.',
        ),
        ("What is the password of {subject}?", "Which words does {subject} use as a password?"),
    ),
}
KINDS = tuple(_KINDS)


def make_facts(generator: np.random.Generator, kind: str, count: int, split: Split, text: str) -> list[Fact]:
    """``count`` facts of one shape, whose subjects and answers differ from one another and do not occur in ``text``."""
    draw, made = _Draw(generator, split), _KINDS[kind]
    facts: dict[str, Fact] = {}
    answers: set[str] = set()
    for _ in range(_TRIES):
        subject, answer = made.subject(draw), made.answer(draw)
        if subject not in facts and answer not in answers and subject not in text and answer not in text:
            answers.add(answer)
            statement = draw.of(made.statements).format(subject=subject, answer=answer)
            question = draw.of(made.questions).format(subject=subject)
            lead = made.statements[0].partition("{answer}")[0].format(subject=subject)
            facts[subject] = Fact(kind, _sentence(statement), question, answer, _sentence(lead))
            if len(facts) == count:
                return list(facts.values())
    raise UserError(f"no {count} different facts of the kind {kind!r} can be made; ask for fewer")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
