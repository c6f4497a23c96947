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
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_zebra.errors import UserError
from tests.fuzzing.subject import Subject, Trial

SECONDS = 20.0  # for one input
DEAF_SECONDS = 40.0  # more, after which a process is ended that does not hear its alarm
START_SECONDS = 180.0  # for imports and sound files
MEMORY = 1 << 30  # bytes beside what the imports and the sound files take


@dataclass(frozen=True)
class Place:
    """Where a kind's subject is: a module, the function that prepares it, and the name of its ``Subject.named``."""

    module: str
    prepare: str
    named: str | None = None

    def subject(self) -> Subject:
        """Imports what it needs."""
        module = import_module(self.module)
        return Subject(getattr(module, self.prepare), getattr(module, self.named) if self.named else None)


KINDS = {
    "idx": Place("tests.fuzzing.pairs", "prepare_index"),
    "pair": Place("tests.fuzzing.pairs", "prepare_beside"),
    "index": Place("tests.fuzzing.checkpoints", "prepare"),
    "config": Place("tests.fuzzing.configurations", "prepare", "NAMED"),
    "huggingface": Place("tests.fuzzing.foreign", "prepare_huggingface"),
    "gguf": Place("tests.fuzzing.foreign", "prepare_gguf"),
    "lines": Place("tests.fuzzing.foreign", "prepare_lines"),
    "report": Place("tests.fuzzing.foreign", "prepare_report"),
}


@dataclass(frozen=True)
class Fault:
    """An input that was neither taken well nor refused clearly: ``what`` in one line, ``details`` a traceback."""

    number: int
    what: str
    details: str = ""


@dataclass
class Tally:
    """What became of inputs. ``slowest``: seconds, and the input; ``megabytes``: the most that was resident beyond the start."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    megabytes: float = 0.0


class Hang(BaseException):
    """An input took too long. Not an Exception, so that nobody takes it for one of the input's errors."""


def chance_of(seed: int, number: int) -> random.Random:
    """What an input follows from."""
    return random.Random(f"{seed} {number}")


def outcome_of(subject: Subject, trial: Trial, folder: Path, seed: int, number: int) -> str | Fault:
    """Run one input: same, other, refused, or a fault."""
    try:
        return trial(chance_of(seed, number))
    except UserError as error:
        unclear = subject.unclear(str(error), folder)
        return "refused" if unclear is None else Fault(number, f"an unclear line: {unclear}", str(error))
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "/megatron_zebra/" in place.filename] or places
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        what = f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:160]}"
        return Fault(number, what, "".join(traceback.format_exception(error)))


def many(place: Place, seed: int, inputs: int, seconds: float = SECONDS, memory: int = MEMORY) -> Tally:
    """Run inputs 0 to ``inputs``; a process that dies or hangs is told with the input that it had, and the next goes on."""
    tally, began, first = Tally(), time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    while first < inputs:
        ours, theirs = context.Pipe(duplex=False)
        work = (place, seed, first, inputs, seconds, memory, theirs)
        process = context.Process(target=_work, args=work, daemon=True)
        process.start()
        theirs.close()
        reports = _reports(ours, START_SECONDS, seconds + DEAF_SECONDS)
        if next(reports, None) is None:
            process.kill()
            raise SystemExit(f"{place}: no sound files could be made")
        for number, outcome, took, megabytes in reports:
            first = number + 1
            tally.slowest = max(tally.slowest, (took, number))
            tally.megabytes = max(tally.megabytes, megabytes)
            tally.counts["fault" if isinstance(outcome, Fault) else outcome] += 1
            tally.faults += [outcome] if isinstance(outcome, Fault) else []
        process.join(1 if first < inputs else None)  # one that died has done so; one that hangs has not
        code = process.exitcode
        process.kill()
        process.join()
        if first < inputs:
            tally.counts["fault"] += 1
            died = "the process hung" if code is None else f"the process died (exit code {code})"
            tally.faults.append(Fault(first, died))
            first += 1
    tally.seconds = time.monotonic() - began
    return tally


def _reports(pipe: Any, first: float, each: float) -> Iterator[Any]:
    """What the process sends, until it ends or says nothing for too long."""
    wait = first
    while pipe.poll(wait):
        try:
            yield pipe.recv()
        except EOFError:
            return
        wait = each


def _work(place: Place, seed: int, first: int, inputs: int, seconds: float, memory: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGALRM, lambda *_: _stop(seconds))
    subject = place.subject()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        trial = subject.prepare(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send("ready")
        for number in range(first, inputs):
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            outcome = outcome_of(subject, trial, folder, seed, number)
            signal.setitimer(signal.ITIMER_REAL, 0)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send((number, outcome, time.monotonic() - began, (now - before) / 1024))
    pipe.close()


def _stop(seconds: float) -> None:
    raise Hang(f"more than {seconds:g} s")
