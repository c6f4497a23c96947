"""Many inputs in one process of bounded memory, each within a time: what neither ends well nor is refused clearly is a fault."""

import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_zebra.errors import UserError
from tests.fuzzing.subject import Subject, Trial

SECONDS = 20.0  # for one input
HARD_SECONDS = 60.0  # where even the alarm is not heard
MEMORY = 1 << 30  # bytes beside what the imports and the sound files take

KINDS: dict[str, tuple[str, str, str | None]] = {
    # module of tests.fuzzing, its function, what a refusal names beside a file
    "idx": ("pairs", "prepare_index", None),
    "pair": ("pairs", "prepare_beside", None),
    "index": ("checkpoints", "prepare", None),
    "config": ("configurations", "prepare", "configurations.NAMED"),
    "huggingface": ("foreign", "prepare_huggingface", None),
    "gguf": ("foreign", "prepare_gguf", None),
    "lines": ("foreign", "prepare_lines", None),
    "report": ("foreign", "prepare_report", None),
}


@dataclass(frozen=True)
class Fault:
    """An input that was neither taken well nor refused clearly: ``what`` in one line, ``details`` a traceback."""

    number: int
    what: str
    details: str = ""


@dataclass
class Tally:
    """What became of the inputs of one kind. ``megabytes``: the most that was resident beyond the process at its start."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    megabytes: float = 0.0


class Hang(BaseException):
    """An input took too long. Not an Exception, so that nobody takes it for one of the input's errors."""


def subject(kind: str) -> Subject:
    """The subject of a kind; imports what it needs."""
    from importlib import import_module

    module, function, named = KINDS[kind]
    found = import_module(f"tests.fuzzing.{module}")
    return Subject(getattr(found, function), getattr(found, named.split(".")[1]) if named else None)


def one(kind: str, seed: int, number: int) -> str:
    """Run one input here, in a new folder; its outcome or its refusal. Whatever else it raises passes."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        found = subject(kind)
        try:
            return found.prepare(Path(name))(_chance(kind, seed, number))
        except UserError as error:
            unclear = found.unclear(str(error), Path(name))
            return f"refused{f', unclear: {unclear}' if unclear else ''}: {error}"


def many(kind: str, seed: int, inputs: int) -> Tally:
    """Run inputs 0 to ``inputs``; a process that dies or hangs is told with the input that it had, and the next goes on."""
    tally, began, first = Tally(), time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    while first < inputs:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, seed, first, inputs, theirs), daemon=True)
        process.start()
        theirs.close()
        if not (ours.poll(3 * HARD_SECONDS) and _ready(ours)):
            process.kill()
            raise SystemExit(f"{kind}: no sound files could be made")
        for number, outcome, seconds, megabytes in _reports(ours):
            first = number + 1
            tally.counts[outcome if isinstance(outcome, str) else "fault"] += 1
            tally.slowest = max(tally.slowest, (seconds, number))
            tally.megabytes = max(tally.megabytes, megabytes)
            if isinstance(outcome, Fault):
                tally.faults.append(outcome)
        process.kill()
        process.join()
        if first < inputs:
            tally.counts["fault"] += 1
            tally.faults.append(Fault(first, f"the process died or hung (exit code {process.exitcode})"))
            first += 1
    tally.seconds = time.monotonic() - began
    return tally


def _reports(pipe: Any) -> Iterator[tuple[int, str | Fault, float, float]]:
    while pipe.poll(HARD_SECONDS):
        try:
            yield pipe.recv()
        except EOFError:
            return


def _ready(pipe: Any) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def _work(kind: str, seed: int, first: int, inputs: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGALRM, _too_long)
    found = subject(kind)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        trial = found.prepare(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(True)
        for number in range(first, inputs):
            began = time.monotonic()
            outcome = _outcome(found, trial, folder, _chance(kind, seed, number), number)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send((number, outcome, time.monotonic() - began, (now - before) / 1024))
    pipe.close()


def _outcome(found: Subject, trial: Trial, folder: Path, chance: random.Random, number: int) -> str | Fault:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return trial(chance)
    except UserError as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        unclear = found.unclear(str(error), folder)
        return "refused" if unclear is None else Fault(number, f"an unclear line: {unclear}", str(error))
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "/megatron_zebra/" in place.filename] or places
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        what = f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:160]}"
        return Fault(number, what, "".join(traceback.format_exception(error)[-12:]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_long(*_: object) -> None:
    raise Hang(f"more than {SECONDS:.0f} s")


def _chance(kind: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{kind} {seed} {number}")
