#!/usr/bin/env python
"""Kill training in every way at random moments, resume it each time, and compare it with a run that was never stopped.

    python tests/kills.py [--kills 100] [--seed 0] [--folder DIR] [--full-disks 12] [-- --checkpoint.background false ...]

Two processes train launch/recipes/debug.yaml, made smaller, and save after every step. In turn: SIGKILL to one rank,
SIGKILL to all at once, SIGTERM to one or all; during the start, at a random moment between two steps, and as soon as a
half-written checkpoint is there. Every sixth job is started by torchrun, the others by the environment that srun gives,
forked from a process that has imported torch (or each start would take ten seconds). After every tenth kill a byte of the
newest checkpoint is turned, as a failing disk would.

While a job runs, ``latest`` must name a complete checkpoint at any moment. After each kill every other process must end by
itself, every checkpoint with an index must be sound, and what ``latest`` named before the kill must be there. The next
start must begin at the newest sound checkpoint. In the end every line of metrics.jsonl must have the loss, the gradient norm
and the place in the data of the run that was never stopped, bit for bit.

Then (as root, who may mount a small tmpfs) the disk is filled before and during saves and emptied again: training must go
on, warn, keep the older checkpoint sound, and save again once there is room.

What follows ``--`` goes to pretrain_zebra.py. Not collected by pytest: it takes about 20 minutes. Exit code 1 for a fault.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_zebra.checkpoint import catalog, layout
from megatron_zebra.checkpoint.verify import verify
from tests.processes import Ended, Ranks, Run

SAME = ("step", "loss", "grad_norm", "learning_rate", "consumed_rows", "consumed_tokens", "targets", "skipped_steps")
RANKS = 2
PATIENCE = 300.0  # seconds for whatever must happen
SETTINGS = {
    "training.global_batch_size": 4,
    "data.sequence_length": 64,
    "data.synthetic.documents": 300,
    "data.synthetic.mean_length": 40,
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 3,
    "evaluation.interval": 0,
    "parallel.timeout": 30,  # as long the others wait for a rank that was killed before it came
}
MOMENTS = ("start", "step", "save", "save")
MANNERS = ("one rank", "all", "one rank", "all", "terminate")


class Faulty(Exception):
    """Something is not as it should be."""


def words(run: Path, steps: int, more: list[str]) -> list[str]:
    """The command line after pretrain_zebra.py."""
    settings = SETTINGS | {"training.steps": steps, "logging.run_dir": run}
    pairs = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--config", "launch/recipes/debug.yaml", *pairs, *more]


def train(command: list[str]) -> None:
    """One rank's process."""
    import pretrain_zebra

    os.chdir(Path(pretrain_zebra.__file__).parent)
    sys.exit(pretrain_zebra.main(command))


class Job:
    """A running training of two processes."""

    def __init__(self, command: list[str], folder: Path, torchrun: bool) -> None:
        folder.mkdir(parents=True)
        self.folder, self.torchrun = folder, torchrun
        self.ranks = None if torchrun else Ranks(folder, train, RANKS, command)
        self.run = Run(command, RANKS, folder, torchrun=True) if torchrun else None

    def signal(self, rank: int, number: int) -> None:
        if self.ranks is not None:
            self.ranks.signal(rank, number)
        else:
            assert self.run is not None
            self.run.kill(rank, number)

    def signal_all(self, number: int) -> None:
        """To all processes, as near to one moment as can be; SIGTERM to torchrun, which passes it on."""
        if self.ranks is not None:
            for rank in range(RANKS):
                self.ranks.signal(rank, number)
        elif number == signal.SIGKILL:
            assert self.run is not None
            self.run.stop()
        else:
            assert self.run is not None
            self.run.processes[0].send_signal(number)

    def ended(self) -> bool:
        if self.ranks is not None:
            return any(process.exitcode is not None for process in self.ranks.processes)
        assert self.run is not None
        return self.run.processes[0].poll() is not None

    def wait(self) -> list[Ended]:
        """How the processes end."""
        job = self.ranks or self.run
        assert job is not None
        try:
            return job.wait(PATIENCE)
        except AssertionError as error:
            raise Faulty(f"the others did not end: {str(error)[-2000:]}") from None

    def stderr(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("*.stderr")))


def lines(run: Path) -> list[dict[str, object]]:
    """Whole lines of metrics.jsonl, each with what must be the same."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: record[name] for name in SAME} for record in whole]


def differences(want: list[dict[str, object]], got: list[dict[str, object]]) -> list[str]:
    """The first line that is not the same."""
    for a, b in zip(want, got):
        if a != b:
            return [f"step {a['step']}: {b} for {a}"]
    return []


def latest(root: Path) -> int:
    """The step that ``latest`` names, 0 without one; Faulty if that is no complete checkpoint."""
    try:
        name = (root / catalog.LATEST).read_text().strip()
    except FileNotFoundError:
        return 0
    if not (root / name / layout.INDEX).is_file():
        raise Faulty(f"latest names {name}, which has no index")
    return int(name.removeprefix("step-").partition(".")[0])


def half_written(root: Path) -> list[Path]:
    """Folders of checkpoints that have no index (those set aside do not count)."""
    found = [entry.folder for entry in catalog.entries(root) if not entry.complete]
    return [folder for folder in found if not (folder / catalog.RETIRED).exists()]


@dataclass
class Killing:
    """A run that is killed again and again: what is known of it, and what was wrong."""

    run: Path
    steps: int
    more: list[str]
    chance: random.Random
    good: list[int] = field(default_factory=list)  # steps of the sound checkpoints
    turned: set[int] = field(default_factory=set)  # steps of those that were damaged by hand
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.run / "checkpoints"

    def kill(self, number: int) -> str:
        """Start the run and kill it; what was done, in words."""
        moment, manner = MOMENTS[number % len(MOMENTS)], MANNERS[number % len(MANNERS)]
        torchrun = number % 6 == 5
        offset, began = len(self._log()), time.time()
        job = Job(words(self.run, self.steps, self.more), self.run.parent / f"kill-{number:03d}", torchrun)
        try:
            completed = self._until(moment, job)
            self._signal(job, manner)
            ends = job.wait()
        except Faulty:
            job.signal_all(signal.SIGKILL)
            raise
        self._check_start(offset)
        half = len([folder for folder in half_written(self.root) if folder.stat().st_mtime > began])
        self._check(completed)
        if manner == "terminate" and moment != "start" and not torchrun and [end.code for end in ends] != [0] * RANKS:
            self.faults.append(f"kill {number}: SIGTERM ended with {ends}")
        how = f"{'torchrun' if torchrun else 'plain'}, {manner}, {moment}"
        self.counts.update([manner, f"moment: {moment}", *["torchrun"] * torchrun, *["hit a save"] * bool(half)])
        return f"{how}: latest was {completed}, good {self.good}, half-written {half}"

    def turn_a_byte(self) -> None:
        """Damage the newest checkpoint, if there is another one."""
        if len(self.good) < 2:
            return
        place = catalog.newest(self.root)
        assert place is not None
        file = self.chance.choice(sorted(place.glob("*.bin")))
        data = file.read_bytes()
        while not verify(place):  # a byte between two tensors is no damage
            at = self.chance.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        self.turned.add(self.good.pop())
        self.counts["bytes turned"] += 1

    def finish(self) -> None:
        """Let the run come to its end."""
        offset = len(self._log())
        job = Job(words(self.run, self.steps, self.more), self.run.parent / "to-the-end", torchrun=False)
        if [end.code for end in job.wait()] != [0] * RANKS:
            raise Faulty(f"the run did not come to its end: {job.stderr()[-3000:]}")
        self._check_start(offset)

    def _log(self) -> str:
        file = self.run / "logs" / "rank-00000.log"
        return file.read_text() if file.exists() else ""

    def _until(self, moment: str, job: Job) -> int:
        """Wait for the moment to kill; the step that ``latest`` named then."""
        if moment == "start":
            time.sleep(self.chance.uniform(0, 12 if job.torchrun else 2))
            return latest(self.root)
        wanted = max(self.good, default=0) + self.chance.randint(1, 2)
        self._poll(job, lambda: latest(self.root) >= wanted)
        if moment == "save":
            self._poll(job, lambda: bool(half_written(self.root)))
        time.sleep(self.chance.uniform(0, 0.02 if moment == "save" else 0.2))
        return latest(self.root)

    def _poll(self, job: Job, there: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            if job.ended() or time.monotonic() > end:
                raise Faulty(f"the run made no progress: {job.stderr()[-3000:]}")
            time.sleep(0.0005)

    def _signal(self, job: Job, manner: str) -> None:
        rank = self.chance.randrange(RANKS)
        number = signal.SIGTERM if manner == "terminate" else signal.SIGKILL
        if manner == "one rank" or (manner == "terminate" and self.chance.random() < 0.5):
            with contextlib.suppress(LookupError):  # torchrun has not started it yet
                job.signal(rank, number)
                return
        job.signal_all(number)

    def _check_start(self, offset: int) -> None:
        """Where the last start began, if it came so far."""
        began = re.search(r"resumed .* at step (\d+)", self._log()[offset:])
        if began and int(began[1]) != max(self.good, default=0):
            self.faults.append(f"began at step {began[1]}, the newest sound checkpoint was {max(self.good, default=0)}")
        if began and int(began[1]) in self.turned:
            self.faults.append(f"began at step {began[1]}, which is damaged")

    def _check(self, completed: int) -> None:
        """All checkpoints after a kill."""
        before, self.good = max(self.good, default=0), []
        for entry in catalog.entries(self.root):
            problems = verify(entry.folder) if entry.complete else []
            if entry.complete and not problems:
                self.good.append(entry.step)
                self.turned.discard(entry.step)  # written anew
            elif problems and entry.step not in self.turned:
                self.faults.append(f"an index over damage: {problems[0]}")
        if max(self.good, default=0) < max(completed, before) and completed not in self.turned:
            self.faults.append(f"step {max(completed, before)} was complete, {self.good} are left")
        if latest(self.root) not in {*self.good, *self.turned, 0}:
            self.faults.append(f"latest names step {latest(self.root)}, good are {self.good}")


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """A file system of ``size`` bytes at ``place``; whether that could be mounted."""
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)


def fill_disks(base: Path, more: list[str], times: int, chance: random.Random, whole: list[dict[str, object]]) -> str:
    """Fill the disk before and during saves, again and again; what was seen, in words."""
    run = base / "full"
    root = run / "checkpoints"
    size = sum(file.stat().st_size for file in (base / "whole" / "checkpoints").rglob("*") if file.is_file())
    with small_disk(root, 3 * size // 2) as mounted:  # 4 checkpoints and a half
        if not mounted:
            return "no disk was filled: mounting a tmpfs takes root"
        job = Job(words(run, len(whole), more), base / "filled", torchrun=False)
        watched = Killing(run, len(whole), more, chance)
        during = 0
        for number in range(times):
            start = latest(root)
            watched._poll(job, lambda start=start: latest(root) > start)
            if number % 2:
                watched._poll(job, lambda: bool(half_written(root)))
                time.sleep(chance.uniform(0, 0.01))
            with (root / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            during += number % 2
            warned = job.stderr().count("was not saved")
            watched._poll(job, lambda warned=warned: job.stderr().count("was not saved") > warned)
            place = root / (root / catalog.LATEST).read_text().strip()
            if problems := verify(place):
                raise Faulty(f"the older checkpoint is not sound: {problems[0]}")
            (root / "filler").unlink()
        start = latest(root)
        watched._poll(job, lambda: latest(root) > start)
        job.signal_all(signal.SIGTERM)
        codes = [end.code for end in job.wait()]
        warnings = job.stderr().count("was not saved")
        found = lines(run)
        if codes != [0] * RANKS or differences(whole, found) or latest(root) != len(found):
            raise Faulty(
                f"after full disks: codes {codes}, {differences(whole, found)}, latest {latest(root)} of {len(found)}"
            )
        return (
            f"the disk was filled {times} times, {during} of them during a save: {warnings} warnings, the older checkpoint was sound "
            f"each time, {len(found)} lines of metrics equal bit for bit, the last step saved"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often to kill (default: 100)")
    parser.add_argument("--full-disks", type=int, default=12, help="how often to fill the disk (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work, new (default: a temporary folder)")
    parser.add_argument("more", nargs="*", help="after --: words for pretrain_zebra.py")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    steps = 3 * arguments.kills + 20
    began = time.monotonic()
    job = Job(words(base / "whole", steps, arguments.more), base / "uninterrupted", torchrun=False)
    if [end.code for end in job.wait()] != [0] * RANKS:
        raise SystemExit(job.stderr()[-3000:])
    whole = lines(base / "whole")
    print(f"uninterrupted: {len(whole)} steps in {time.monotonic() - began:.0f} s ({base})", flush=True)
    killing = Killing(base / "killed", steps, arguments.more, random.Random(arguments.seed))
    faults: list[str] = []
    try:
        for number in range(arguments.kills):
            said = killing.kill(number)
            if number % 10 == 9:
                killing.turn_a_byte()
            print(f"{number:3d} {time.monotonic() - began:5.0f} s  {said}", flush=True)
        killing.finish()
        found = lines(base / "killed")
        faults += differences(whole, found) or (
            [f"{len(found)} lines for {len(whole)}"] if len(found) != len(whole) else []
        )
        if arguments.full_disks:
            print(fill_disks(base, arguments.more, arguments.full_disks, killing.chance, whole), flush=True)
    except Faulty as error:
        faults.append(str(error))
    print(", ".join(f"{name} {count}" for name, count in sorted(killing.counts.items())))
    for fault in [*killing.faults, *faults]:
        print(f"FAULT: {fault}")
    failed = bool(killing.faults or faults)
    print(
        f"{arguments.kills} kills in {time.monotonic() - began:.0f} s: metrics {'FAULTS' if failed else 'equal bit for bit'}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
