"""A group of ranks that talk to each other. All communication of our own goes through here, and is counted here.

Bytes are those that a rank receives: what an all-to-all brings is exact; for the others, what a ring needs, with n ranks
and a whole tensor of b bytes: all-gather and reduce-scatter b (n - 1) / n, all-reduce twice that.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


class Traffic:
    """What one rank's collectives did since ``reset``: bytes received and seconds waited, by name of group.

    ``current`` says in which collective this rank is (None: in none), and ``operations`` grows as long as it moves, for whoever
    asks why a run stands still.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds = 0.0
        self.current: str | None = None
        self.operations = 0

    def reset(self) -> None:
        """Count from zero."""
        self.bytes.clear()
        self.seconds = 0.0
        self.operations += 1

    @contextmanager
    def within(self, what: str, waits: bool = True) -> Iterator[None]:
        """Mark this rank as being in ``what``, and count the time if it only ``waits`` there. The mark stays on failure."""
        before, began = self.current, time.perf_counter()
        self.current = what
        self.operations += 1
        yield
        self.current = before
        if waits:
            self.seconds += time.perf_counter() - began


@dataclass(frozen=True, eq=False)
class Group:
    """``ranks`` (of the world) that share collectives; this process is ``ranks[rank]``.

    A group of one sends nothing: every operation is then the identity, and needs no ``handle``.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @staticmethod
    def alone(name: str) -> "Group":
        """The group of one process."""
        return Group(name, (0,), 0)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Sum (or ``op``) over the ranks, in place; returns ``x``."""
        if self.size > 1:
            with self.traffic.within(f"all-reduce of {self}"):
                dist.all_reduce(x, op, group=self.handle)
            self.count(2 * _bytes(x) * (self.size - 1) // self.size)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' ``x`` [n, ...] one after another: [size * n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        with self.traffic.within(f"all-gather of {self}"):
            dist.all_gather_into_tensor(out, x.contiguous(), group=self.handle)
        self.count(_bytes(out) * (self.size - 1) // self.size)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part [n, ...] of the sum over the ranks of ``x`` [size * n, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        with self.traffic.within(f"reduce-scatter of {self}"):
            dist.reduce_scatter_tensor(out, x.contiguous(), group=self.handle)
        self.count(_bytes(x) * (self.size - 1) // self.size)
        return out

    def all_to_all(
        self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor, label: str
    ) -> dist.Work | None:
        """Start sending rows of ``x`` [sum(send), ...], ``send[r]`` of them to rank r, into ``out`` [sum(receive), ...].

        ``x`` and ``out`` must live until the returned work (None: nothing to wait for) has been given to ``wait``.
        ``label`` is the name under which the bytes are counted.
        """
        if self.size == 1:
            return None
        with self.traffic.within(f"all-to-all of {self} ({label})"):
            work: dist.Work = dist.all_to_all_single(out, x, list(receive), list(send), self.handle, async_op=True)
        row = _bytes(out) // max(1, out.shape[0])
        self.traffic.bytes[label] += row * (sum(receive) - receive[self.rank])
        return work

    def wait(self, work: dist.Work | None) -> None:
        """Wait for what ``all_to_all`` started."""
        if work is not None:
            with self.traffic.within(f"all-to-all of {self}"):
                work.wait()

    def count(self, received: int) -> None:
        """Add to the bytes that this rank received in this group."""
        self.traffic.bytes[self.name] += received

    def __str__(self) -> str:
        return f"{self.name} (ranks {', '.join(map(str, self.ranks))})"


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
