"""The tasks: what is planted in a text and where, what is asked for at its end, and the one right answer.

A task is a function of seeded draws alone. Depths are shares of the text, 0 at its beginning, 1 at its end. Nothing that is
planted occurs in the text before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_zebra.data.qa.facts import KINDS, make_facts
from megatron_zebra.errors import UserError

_TRIES = 1000
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Counts:
    """How much is planted: ``distractors`` of the shape of what is asked for, ``needles`` of the task of that name,
    ``hops`` from variable to variable."""

    distractors: int = 3
    needles: int = 3
    hops: int = 3


@dataclass(frozen=True)
class Case:
    """``planted`` and ``answers`` are (depth, text). The prompt ends in ``question`` and ``lead``; the answers follow in
    this order, each with what separates it from the one before."""

    planted: list[tuple[float, str]]
    question: str
    lead: str
    answers: list[tuple[float, str]]


@dataclass
class Draw:
    """Seeded choices for a case in the ``stratum``-th of ``strata`` equal parts of ``text``; no name or number twice."""

    generator: np.random.Generator
    text: str
    stratum: int
    strata: int
    counts: Counts
    _taken: set[str] = field(default_factory=set)

    def depth(self, further: int = 0) -> float:
        """Within the stratum, or one that lies ``further`` (from the last on to the first)."""
        return float(((self.stratum + further) % self.strata + self.generator.random()) / self.strata)

    def anywhere(self, after: float = 0.0) -> float:
        return float(self.generator.uniform(after, 1.0))

    def number(self) -> str:
        """Five digits."""
        return self._new(lambda: str(self.generator.integers(10_000, 100_000)))

    def name(self) -> str:
        """Three made-up syllables."""
        return self._new(lambda: "".join(self._of(_CONSONANTS) + self._of(_VOWELS) for _ in range(3)).capitalize())

    def _of(self, letters: str) -> str:
        return letters[int(self.generator.integers(len(letters)))]

    def _new(self, make: Callable[[], str]) -> str:
        for _ in range(_TRIES):
            made = make()
            if made not in self._taken and made not in self.text:
                self._taken.add(made)
                return made
        raise UserError(
            f"no name or number was found in {_TRIES} tries that the text does not hold; give another --text"
        )


def passkey(draw: Draw) -> Case:
    """One number, stated once."""
    key, depth = draw.number(), draw.depth()
    return Case(
        [(depth, f"The pass key is {key}. Remember it.")],
        "What is the pass key?",
        "The pass key is",
        [(depth, f" {key}")],
    )


def needle(draw: Draw) -> Case:
    """A fact among others of the same shape: a code, a date, a name, ... of one of several subjects."""
    kind = KINDS[int(draw.generator.integers(len(KINDS)))]
    facts = make_facts(draw.generator, kind, 1 + draw.counts.distractors, "valid", draw.text)
    depths = [draw.depth(), *(draw.anywhere() for _ in facts[1:])]
    planted = [(depth, fact.statement) for depth, fact in zip(depths, facts)]
    asked = facts[0]
    lead = asked.lead.rstrip()
    return Case(planted, asked.question, lead, [(depths[0], asked.lead[len(lead) :] + asked.answer)])


def needles(draw: Draw) -> Case:
    """Several numbers of one name among those of others. They are asked for in the order of the text; each counts alone,
    at its own depth, after the right ones before it. The strata of a case's needles are spread over the text, so that
    over all cases every stratum has as many."""
    count = draw.counts.needles
    depths = sorted(draw.depth(n * draw.strata // count) for n in range(count))
    name, numbers = draw.name(), [draw.number() for _ in depths]
    planted = [(depth, f"One of the numbers of {name} is {number}.") for depth, number in zip(depths, numbers)]
    for _ in range(draw.counts.distractors):
        planted.append((draw.anywhere(), f"One of the numbers of {draw.name()} is {draw.number()}."))
    answers = [(depth, f"{',' * (n > 0)} {number}") for n, (depth, number) in enumerate(zip(depths, numbers))]
    return Case(
        planted, f"Which are the numbers of {name}, in the order of the text?", f"The numbers of {name} are", answers
    )


def variables(draw: Draw) -> Case:
    """A number is assigned to a variable, that one to the next, and so on: the number is asked for by the last name. The
    number stands in the stratum, the further assignments in order between there and the end; so do those of other chains."""
    planted, asked, found = [], "", ""
    for chain in range(1 + draw.counts.distractors):
        first = draw.anywhere() if chain else draw.depth()
        depths = [first, *sorted(draw.anywhere(first) for _ in range(draw.counts.hops))]
        value = number = draw.number()
        for depth in depths:
            name = draw.name()
            planted.append((depth, f"The variable {name} is set to {value}."))
            value = f"the variable {name}"
        if not chain:
            asked, found = name, number
    answers = [(planted[0][0], f" {found}")]
    return Case(
        planted, f"Which number does the variable {asked} stand for?", f"The variable {asked} stands for", answers
    )


def words(draw: Draw) -> Case:
    """Words are called throughout the text, three of them 8, 4 and 2 times, others once: which are the commonest, the
    commonest first? There is no depth; the whole text is one stratum."""
    common, rare = [draw.name() for _ in range(3)], [draw.name() for _ in range(2 * draw.counts.distractors)]
    calls = [word for word, times in zip(common, (8, 4, 2)) for _ in range(times)] + rare
    planted = [(draw.anywhere(), f"A voice calls {word}.") for word in calls]
    answers = [(0.0, f"{',' * (n > 0)} {word}") for n, word in enumerate(common)]
    question = "Which three words does the voice call most often, the commonest first?"
    return Case(planted, question, "The voice calls most often", answers)


TASKS: dict[str, Callable[[Draw], Case]] = {
    "passkey": passkey,
    "needle": needle,
    "needles": needles,
    "variables": variables,
    "words": words,
}
EVERYWHERE = {"words"}  # tasks without a depth
