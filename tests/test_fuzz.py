"""Some inputs of tests/fuzz.py (the program reads thousands), and that it would see a fault."""

import random
from pathlib import Path

import pytest

from megatron_zebra.errors import UserError
from tests.fuzzing.run import KINDS, Fault, Place, many, outcome_of
from tests.fuzzing.subject import Outcome, Trial

INPUTS = {"config": 40, "index": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_read_rightly_or_refused_in_a_clear_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = KINDS[kind].subject()
    trial = subject.prepare(tmp_path)
    outcomes = [outcome_of(subject, trial, tmp_path, 0, number) for number in range(INPUTS.get(kind, 60))]
    for outcome in outcomes:
        assert not isinstance(outcome, Fault), f"input {outcome.number}: {outcome.what}\n{outcome.details}"
    assert "refused" in outcomes


def prepare_faulty(folder: Path) -> Trial:
    """One fault of each kind."""
    numbers = iter(range(10))

    def trial(chance: random.Random) -> Outcome:
        number = next(numbers)
        if number == 0:
            raise UserError("something is wrong")
        if number == 1:
            raise KeyError("model")
        if number == 2:
            assert bytearray(1 << 30)
        if number == 3:
            while True:
                pass
        if number == 4:
            raise UserError(f"{folder / 'a'}: is refused")
        return "other"

    return trial


def test_faults_are_seen() -> None:
    tally = many(Place("tests.test_fuzz", "prepare_faulty"), 0, 6, seconds=0.5, memory=1 << 28)
    assert dict(tally.counts) == {"fault": 4, "refused": 1, "other": 1}
    said = [(fault.number, fault.what.split(":")[0].split(" in ")[0]) for fault in tally.faults]
    assert said == [(0, "an unclear line"), (1, "KeyError"), (2, "MemoryError"), (3, "Hang")]


def prepare_deadly(folder: Path) -> Trial:
    """A process that ends."""

    def trial(chance: random.Random) -> Outcome:
        raise SystemExit(3)

    return trial


def test_a_process_that_dies_is_told_and_the_next_goes_on() -> None:
    tally = many(Place("tests.test_fuzz", "prepare_deadly"), 0, 2)
    assert [(fault.number, fault.what) for fault in tally.faults] == [
        (n, "the process died (exit code 3)") for n in range(2)
    ]
