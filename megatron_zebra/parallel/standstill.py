"""When nothing moves for long: who waits in which collective, who is not there, and the stacks of all threads in the logs.

Each rank counts its own beats without progress. After ``after`` seconds it leaves in the group's store where it stands, and
writes its threads' stacks to its log; the first that waits in a collective then reads where all are and tells. Nothing ends:
what takes long may be meant (an evaluation on one rank), and for what never ends there is ``parallel.timeout``.
"""

import contextlib
import faulthandler
import logging
from collections import defaultdict
from collections.abc import Callable

import torch.distributed as dist

_KEYS = "megatron_zebra/standstill"
_NAMED = 8
ALONE = "in no collective"  # how a place begins where a rank keeps others waiting


class Standstill:
    """One rank's part, asked with every beat."""

    def __init__(self, rank: int, size: int, name: Callable[[int], str], after: float, beat: float) -> None:
        self.rank, self.size, self.name, self.after, self.beat = rank, size, name, after, beat
        self._progress, self._beats, self._reported = -1, 0, False

    def look(self, store: dist.Store, progress: int, place: Callable[[], str]) -> str | None:
        """A line to tell, once in a standstill and by one rank of those that wait; None otherwise.

        Args:
            progress: a number that changes as long as this rank moves.
            place: where this rank is, in words.
        """
        if progress != self._progress:
            if self._seconds() >= self.after:
                store.set(f"{_KEYS}/place/{self.rank}", "")
            self._progress, self._beats, self._reported = progress, 0, False
            return None
        before, self._beats = self._seconds(), self._beats + 1
        if not self.after or self._seconds() < self.after:
            return None
        if before < self.after:
            store.set(f"{_KEYS}/place/{self.rank}", place())
            self._write_stacks()
        elif (
            not self._reported and self._seconds() >= self.after + 3 * self.beat
        ):  # so that the others have come as far
            self._reported = True
            if not place().startswith(ALONE) and store.add(f"{_KEYS}/reporter/{progress}", 1) == 1:
                line = self._line(store)
                store.set(f"{_KEYS}/report", line)
                return line
        return None

    def _seconds(self) -> float:
        return self._beats * self.beat

    def _line(self, store: dist.Store) -> str:
        waiting: dict[str, list[int]] = defaultdict(list)
        absent = []
        for rank in range(self.size):
            key = f"{_KEYS}/place/{rank}"
            place = store.get(key).decode() if store.check([key]) else ""
            if place and not place.startswith(ALONE):
                waiting[place].append(rank)
            else:
                absent.append(f"{self.name(rank)} {place or 'moves'}")
        waits = "; ".join(f"rank {', '.join(map(str, ranks[:_NAMED]))} {place}" for place, ranks in waiting.items())
        others = "; ".join(absent[:_NAMED]) + (f" and {len(absent) - _NAMED} more" if absent[_NAMED:] else "")
        return (
            f"no progress for {self.after:g} s: {waits}; not waiting there: {others or 'none'}; the stacks of all threads are in the "
            "ranks' logs"
        )

    def _write_stacks(self) -> None:
        log = logging.getLogger(f"megatron_zebra.rank{self.rank}")
        for handler in log.handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                log.warning("no progress for %g s; all threads:", self.after)
                handler.flush()
                faulthandler.dump_traceback(handler.stream, all_threads=True)


def last_report(store: dist.Store) -> str:
    """The line that was told last, in parentheses; empty without one."""
    with contextlib.suppress(dist.DistError):
        if store.check([f"{_KEYS}/report"]):
            return f" ({store.get(f'{_KEYS}/report').decode()})"
    return ""
