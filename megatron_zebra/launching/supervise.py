"""Run a launcher, hand signals on to the processes that train, and say in an exit code what is to be done next.

torchrun and DeepSpeed's launcher answer SIGTERM by giving the processes 30 s and killing them then, which is too short for
a step on a million tokens and its checkpoint. So the processes get the signal from here, and the launcher ends with them.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from megatron_zebra.checkpoint.catalog import entries
from megatron_zebra.config.sections import Config

DONE, FAILED, MISTAKE, AGAIN = 0, 1, 2, 75  # 75: EX_TEMPFAIL of sysexits.h
LOST = 70  # from the agent: the nodes have lost touch
SILENCE = 20.0  # seconds without an answer after which a node counts as out of reach
PATIENCE = 600.0  # seconds to wait for the node that keeps the meeting place, as torchrun waits for the others
# SIGUSR1 is what Slurm's srun hands on, SIGHUP a terminal or an ssh connection that is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Node0:
    """The node that keeps the meeting place, where that is another one."""

    host: str
    port: int

    def answers(self) -> bool:
        """Whether something listens there."""
        try:
            socket.create_connection((self.host, self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def wait(self, seconds: float, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Whether it answers within ``seconds``, or before ``given_up``."""
        until = time.monotonic() + seconds
        while not (answers := self.answers()) and time.monotonic() < until and not given_up():
            time.sleep(0.5)
        return answers


def supervise(
    command: Callable[[], Sequence[str]],
    restarts: int,
    retry: Collection[int],
    finished: Callable[[], bool],
    node0: Node0 | None = None,
    ranks_of: Callable[[int], list[psutil.Process]] | None = None,
) -> int:
    """Run ``command()`` until it ends, up to ``restarts`` times more if it ends with one of ``retry``.

    One of ``SIGNALS`` reaches the training processes as SIGTERM: they save after the step that they are in. Processes that
    did not get so far die of it; where the launcher starts others in their place, it is ended itself. A second
    SIGINT ends it in any case.

    Args:
        finished: whether the run has come to its last step, asked where the command succeeded or was stopped.
        node0: waited for before each start; when it is out of reach and no training process is left, the command is
            ended and counts as LOST (torch may wait for its answer for ever).
        ranks_of: the training processes of this node that a command's process has started; ``ranks_below`` if None.

    Returns:
        DONE: the run has come to its last step.
        AGAIN: it was stopped; the same command goes on from the checkpoint.
        MISTAKE: the user's, so that starting again would not help.
        FAILED: anything else.
    """
    with _caught() as caught:
        while True:
            code = LOST
            if node0 is None or node0.wait(PATIENCE, lambda: bool(caught)):
                code = _run(command(), caught, node0, ranks_of or ranks_below)
            elif not caught:
                _say(f"{node0.host}:{node0.port}, where the nodes meet, did not answer within {PATIENCE:g} s")
                return FAILED
            if caught or restarts <= 0 or code not in retry:
                break
            restarts -= 1
            _say(f"starting again; {restarts} more restarts")
    if code == DONE or (caught and code != MISTAKE):
        return DONE if finished() else AGAIN
    return MISTAKE if code == MISTAKE else FAILED


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


def ranks_with(words: Sequence[str]) -> list[psutil.Process]:
    """The ranks on this node whose command line ends with ``words``, whoever started them (over ssh: no child of ours)."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-len(words) :] == list(words) and "RANK" in process.environ():
                found[process.pid] = process
    return [process for process in found.values() if process.ppid() not in found]


def _run(
    command: Sequence[str], caught: list[int], node0: Node0 | None, ranks_of: Callable[[int], list[psutil.Process]]
) -> int:
    # A session of its own: what Ctrl-C sends to all of a terminal comes to this process alone.
    process = subprocess.Popen(command, start_new_session=True)
    told: set[int] = set()
    ending, began, heard = False, False, time.monotonic()
    while (code := process.poll()) is None:
        ranks = ranks_of(process.pid) if caught or node0 else []
        began = began or bool(ranks)
        if caught and not ending:
            new = [rank for rank in ranks if rank.pid not in told]
            # None yet, others in the place of those that were told, or a user who insists.
            if bool(new) == bool(told) or caught.count(signal.SIGINT) > 1:
                process.terminate()
                ending = True
            for rank in new:
                with contextlib.suppress(psutil.Error):
                    rank.terminate()
            told |= {rank.pid for rank in new}
        if node0 is None or ranks or not began or node0.answers():
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE:
            _say(f"{node0.host}:{node0.port}, where the nodes meet, cannot be reached")
            process.kill()
            process.wait()
            return LOST
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
    return code


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """The numbers of the signals that have come, in a list that grows; SIGHUP not under nohup."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    former = {number: signal.signal(number, note) for number in SIGNALS if number != signal.SIGHUP or not nohup}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
