"""Run a launcher, hand signals on to the processes that train, and say in an exit code what is to be done next.

torchrun and DeepSpeed's launcher answer SIGTERM by giving the processes 30 s and killing them then, which is too short for
a step on a million tokens and its checkpoint. So the processes get the signal from here, and the launcher ends with them.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from megatron_zebra.checkpoint.catalog import entries
from megatron_zebra.config.sections import Config

DONE, FAILED, MISTAKE, AGAIN = 0, 1, 2, 75  # 75: EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1 is what Slurm's srun hands on


def supervise(command: Sequence[str], restarts: int, finished: Callable[[], bool]) -> int:
    """Run ``command`` until it ends, up to ``restarts`` times more if it fails.

    One of ``SIGNALS`` reaches the training processes as SIGTERM: they save after the step that they are in. Processes that
    did not get so far die of it; where the launcher starts others in their place, it is ended itself. A second
    SIGINT ends it in any case.

    Args:
        finished: whether the run has come to its last step, asked where the command succeeded or was stopped.

    Returns:
        DONE: the run has come to its last step.
        AGAIN: it was stopped; the same command goes on from the checkpoint.
        MISTAKE: the user's, so that starting again would not help.
        FAILED: anything else.
    """
    with _caught() as caught:
        while True:
            code = _run(command, caught)
            if code in (DONE, MISTAKE):
                break
            if caught or restarts <= 0:
                break
            restarts -= 1
    if code == DONE or (caught and code != MISTAKE):
        return DONE if finished() else AGAIN
    return code if code == MISTAKE else FAILED


def at_last_step(config: Config, folder: Path) -> bool:
    """Whether the newest checkpoint of the run in ``folder`` is of ``training.steps`` (every run ends with one)."""
    return any(entry.complete and entry.step >= config.training.steps for entry in entries(folder / "checkpoints"))


def ranks_below(pid: int) -> list[psutil.Process]:
    """The topmost processes below ``pid`` that a launcher made a rank."""
    found, look = [], [pid]
    while look:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(look.pop()).children():
                if "RANK" in child.environ():
                    found.append(child)
                else:
                    look.append(child.pid)
    return found


def _run(command: Sequence[str], caught: list[int]) -> int:
    # A session of its own: what Ctrl-C sends to all of a terminal comes to this process alone.
    process = subprocess.Popen(command, start_new_session=True)
    told: set[int] = set()
    ending = False
    while (code := process.poll()) is None:
        if caught and not ending:
            new = [rank for rank in ranks_below(process.pid) if rank.pid not in told]
            # None yet, others in the place of those that were told, or a user who insists.
            if bool(new) == bool(told) or caught.count(signal.SIGINT) > 1:
                process.terminate()
                ending = True
            for rank in new:
                with contextlib.suppress(psutil.Error):
                    rank.terminate()
            told |= {rank.pid for rank in new}
        time.sleep(0.1)
    return code


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """The numbers of the signals that have come, in a list that grows."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    former = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


__all__ = ["AGAIN", "DONE", "FAILED", "MISTAKE", "at_last_step", "ranks_below", "supervise"]
