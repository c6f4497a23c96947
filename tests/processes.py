"""Start the ranks of a run as processes of their own, kill one, and see how the others end.

``Ranks`` runs a function on forked processes (quick: the imports are done), ``Run`` runs pretrain_zebra.py as users do, by
torchrun or by the plain environment that Slurm's srun gives.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_zebra.errors import UserError, tell

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative: by that signal), stderr, and seconds since ``wait`` was called."""

    code: int
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that tell an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Ranks:
    """``fn(*args)`` on ``size`` forked processes, each with a rank's environment, as pretrain_zebra.py would run it."""

    def __init__(self, folder: Path, fn: Callable[..., None], size: int, *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        port = free_port()
        self.files = [folder / f"rank-{rank}.stderr" for rank in range(size)]
        self.processes = [
            context.Process(target=_rank, args=(fn, rank, size, port, self.files[rank], args)) for rank in range(size)
        ]
        for file, process in zip(self.files, self.processes):
            file.touch()  # a process may be killed before it has opened its own
            process.start()

    def signal(self, rank: int, number: int) -> None:
        """Send signal ``number`` to ``rank``."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float) -> list[Ended]:
        """How each rank ends; an AssertionError if one still runs after ``seconds``."""
        began, ends = time.monotonic(), {}
        try:
            while len(ends) < len(self.processes):
                assert time.monotonic() < began + seconds, f"still running: {set(range(len(self.files))) - set(ends)}"
                for rank, process in enumerate(self.processes):
                    if rank not in ends and process.exitcode is not None:
                        ends[rank] = time.monotonic() - began
                time.sleep(0.01)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode or 0, file.read_text(), ends[rank])
            for rank, (process, file) in enumerate(zip(self.processes, self.files))
        ]


def _rank(fn: Callable[..., None], rank: int, size: int, port: int, stderr: Path, args: Sequence[Any]) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        fn(*args)
    except UserError as error:
        tell(error)
        sys.exit(error.code)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """A training run of ``size`` processes on this machine: ``pretrain_zebra.py`` with ``words``.

    By torchrun, or without it: then ``words_of(rank)`` may add words of that rank's own.
    """

    def __init__(
        self,
        words: Sequence[str],
        size: int,
        folder: Path,
        *,
        torchrun: bool,
        words_of: Callable[[int], Sequence[str]] = lambda rank: (),
    ) -> None:
        self.torchrun, self.size = torchrun, size
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        program = ["pretrain_zebra.py", *words]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        plain = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.files, self.processes = [], []
        for rank in range(1 if torchrun else size):
            command = [*launcher, *program] if torchrun else [sys.executable, *program, *words_of(rank)]
            own = {} if torchrun else plain | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.files.append(folder / f"process-{rank}.stderr")
            with self.files[-1].open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment | own, stderr=stderr, stdout=subprocess.DEVNULL)
                )

    def process(self, rank: int) -> psutil.Process:
        """The process of ``rank``."""
        if not self.torchrun:
            return psutil.Process(self.processes[rank].pid)
        for child in psutil.Process(self.processes[0].pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank) and "pretrain_zebra.py" in child.cmdline():
                    return child
        raise LookupError(f"rank {rank} does not run")

    def wait_for_step(self, run_dir: Path, step: int, seconds: float = 300) -> None:
        """Return when ``run_dir`` has the metrics of ``step`` steps."""
        file, end = run_dir / "metrics.jsonl", time.monotonic() + seconds
        while not (file.exists() and file.read_bytes().count(b"\n") >= step):
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.stop()
                raise AssertionError(f"no step {step} in {file}: {''.join(f.read_text() for f in self.files)[-3000:]}")
            time.sleep(0.02)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send signal ``number`` to ``rank``."""
        self.process(rank).send_signal(number)

    def wait(self, seconds: float) -> list[Ended]:
        """How each process ends (by torchrun: the launcher); an AssertionError if one still runs after ``seconds``."""
        began, ends = time.monotonic(), [0.0] * len(self.processes)
        try:
            for i, process in enumerate(self.processes):
                process.wait(max(0.01, began + seconds - time.monotonic()))
                ends[i] = time.monotonic() - began
        except subprocess.TimeoutExpired as problem:
            raise AssertionError(f"{problem}: {''.join(f.read_text() for f in self.files)[-3000:]}") from None
        finally:
            self.stop()
        return [Ended(p.returncode, file.read_text(), end) for p, file, end in zip(self.processes, self.files, ends)]

    def stop(self) -> None:
        """End everything that still runs."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with contextlib.suppress(psutil.Error):
                        one.kill()
            process.wait()


def train_and_kill(
    words: Sequence[str], size: int, rank: int, step: int, folder: Path, *, torchrun: bool, seconds: float = 60
) -> list[Ended]:
    """Train in ``folder``/run, SIGKILL ``rank`` after ``step`` steps, and see how all ended within ``seconds`` from there."""
    run = Run([*words, "--logging.run_dir", str(folder / "run")], size, folder, torchrun=torchrun)
    run.wait_for_step(folder / "run", step)
    run.kill(rank)
    return run.wait(seconds)
