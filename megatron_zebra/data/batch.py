"""Batches: which rows a rank reads at a step, as torch tensors, prepared ahead in a thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from megatron_zebra.attention.segments import Segments
from megatron_zebra.data.rows import IGNORE, Row, RowReader
from megatron_zebra.errors import UserError
from megatron_zebra.parallel.context.shard import ContextParallel, ContextShard


@dataclass(frozen=True)
class MicroBatch:
    """b rows of S tokens, flattened: ``tokens``, ``labels``, ``positions`` int64 [b·S] as in ``Row``.

    ``cu_seqlens`` int64 [segments + 1] on the host: segment i is the tokens cu_seqlens[i] .. cu_seqlens[i + 1]; row ends
    are segment ends. ``sources`` int64 [b] on the host: the source of each row. No array is larger than O(b·S).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    sequence_length: int

    @property
    def rows(self) -> int:
        """b."""
        return self.sources.size

    def here(self, device: torch.device | str, context: ContextParallel | None = None) -> "LocalBatch":
        """What this rank computes of it, on its device."""
        segments: Segments | ContextShard
        tensors: tuple[torch.Tensor, ...] = (self.tokens, self.positions, self.labels)
        if context is None or context.group.size == 1:
            segments = Segments.from_cu_seqlens(self.cu_seqlens, device=device)
        else:
            segments = ContextShard(self.cu_seqlens, self.rows, self.sequence_length, context, device)
            index = torch.from_numpy(segments.local_index)
            tensors = tuple(tensor[index] for tensor in tensors)
        targets = int((tensors[2] != IGNORE).sum())  # here, where no device is waited for
        tokens, positions, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return LocalBatch(tokens, positions, segments, labels, self.sources, targets)


@dataclass(frozen=True)
class LocalBatch:
    """One context-parallel rank's tokens of a micro-batch (all of them without context parallelism), on its device.

    tokens, positions, labels: int64 [T]; each of the rows has T / rows of them, in order. ``targets``: how many labels
    are targets. ``sources`` as in MicroBatch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: Segments | ContextShard
    labels: torch.Tensor
    sources: npt.NDArray[np.int64]
    targets: int

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, Segments | ContextShard, torch.Tensor]:
        """What the decoder takes."""
        return self.tokens, self.positions, self.segments, self.labels


@dataclass(frozen=True)
class StepBatch:
    """What one rank reads at one optimizer step; ``consumed_rows`` of the order were read before it, by all ranks."""

    step: int
    consumed_rows: int
    global_batch_size: int
    sequence_length: int
    micro_batches: list[MicroBatch]


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Rows of one length, flattened."""
    length = rows[0].tokens.size
    cu_seqlens = np.concatenate([[0], np.cumsum(np.concatenate([row.lengths for row in rows]))])
    tokens, labels, positions = (
        torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
        for name in ("tokens", "labels", "positions")
    )
    return MicroBatch(tokens, labels, positions, cu_seqlens, np.array([row.source for row in rows]), length)


def read_step(
    reader: RowReader,
    step: int,
    consumed_rows: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> StepBatch:
    """The micro-batches of one rank at one step: rows dp_rank::dp_size of the next ``global_batch_size`` rows."""
    if global_batch_size % (micro_batch_size * dp_size):
        raise UserError(
            f"a global batch of {global_batch_size} rows at step {step} cannot be divided into micro-batches of "
            f"{micro_batch_size} on {dp_size} data-parallel ranks; a multiple of {micro_batch_size * dp_size} is needed"
        )
    length = reader.sequence_length(consumed_rows)
    if length != reader.sequence_length(consumed_rows + global_batch_size - 1):
        raise ValueError(f"step {step} (rows from {consumed_rows}) spans two phases of the sequence-length schedule")
    rows = range(consumed_rows + dp_rank, consumed_rows + global_batch_size, dp_size)
    batches = [
        collate([reader.read(row) for row in rows[first : first + micro_batch_size]])
        for first in range(0, len(rows), micro_batch_size)
    ]
    return StepBatch(step, consumed_rows, global_batch_size, length, batches)


class BatchLoader:
    """Iterates over the StepBatches of one rank from ``step`` on, ``prefetch`` of them prepared ahead by a thread.

    ``global_batch_size`` is a number, or a function of the step. ``stop`` is the step not to read any more (None: never).
    An error while reading is raised where the batch would have come out. ``close`` (or ``with``) ends the thread.
    """

    def __init__(
        self,
        reader: RowReader,
        global_batch_size: int | Callable[[int], int],
        micro_batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        step: int = 0,
        consumed_rows: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
    ) -> None:
        self._reader, self._micro_batch_size = reader, micro_batch_size
        self._global_batch_size = global_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._first, self._consumed_rows, self._stop = step, consumed_rows, stop
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, StepBatch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """End the thread; further iteration stops. May be called again."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # the thread may be waiting for a free place
                self._queue.get(timeout=0.01)
        self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        step, consumed = self._first, self._consumed_rows
        try:
            while not self._closed.is_set() and (self._stop is None or step < self._stop):
                size = (
                    self._global_batch_size
                    if isinstance(self._global_batch_size, int)
                    else self._global_batch_size(step)
                )
                self._queue.put(
                    read_step(self._reader, step, consumed, size, self._micro_batch_size, self._dp_rank, self._dp_size)
                )
                step, consumed = step + 1, consumed + size
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)
