"""Best-fit-decreasing packing of documents into rows, as a few operations on whole groups of equal pieces."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowTable:
    """Packed rows: row r holds the pieces offsets[r] .. offsets[r + 1], each a span of the source.

    ``offsets`` int64 [rows + 1], ``starts`` int64 [pieces] and ``lengths`` int32 [pieces] in tokens, ``tokens`` their
    sum. ``documents`` counts the documents that were packed.
    """

    offsets: Ints
    starts: Ints
    lengths: npt.NDArray[np.int32]
    tokens: int
    documents: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.offsets.size - 1

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The pieces of a row, in the order of the source."""
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        starts = self.starts[part]
        return list(zip(starts.tolist(), (starts + self.lengths[part]).tolist()))


def best_fit_decreasing(sizes: Ints, capacity: int) -> Ints:
    """The bin of each piece: int64 [pieces], numbered from 0. ``sizes`` int64 [pieces], each from 1 to ``capacity``.

    The longest piece goes first, into the fullest bin that still has room, or into a new one. Bins with equal room are
    handled together, and so are pieces of equal size: the time is that of a sort, not that of a loop over pieces.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(sizes.size, np.int64)
    values, counts = np.unique(sizes, return_counts=True)
    room: dict[int, list[Ints]] = {}  # free tokens -> groups of bins that have so many
    levels: list[int] = []  # the keys of ``room``, ascending
    opened, placed = 0, 0

    def keep(free: int, group: Ints) -> None:
        if free and group.size:
            if free not in room:
                insort(levels, free)
            room.setdefault(free, []).append(group)

    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        end = placed + count
        while placed < end:
            place = bisect_left(levels, size)
            if place < len(levels):
                free = levels[place]
                group = room[free].pop()
                if not room[free]:
                    del room[free], levels[place]
            else:
                free = capacity
                group = opened + np.arange(-(-(end - placed) // (capacity // size)))
                opened += group.size
            each = free // size  # a bin is the fullest with room until it has none for this size
            full, some = divmod(min(end - placed, group.size * each), each)
            bins[placed : placed + full * each] = np.repeat(group[:full], each)
            placed += full * each
            bins[placed : placed + some] = group[full] if some else 0
            placed += some
            keep(free - each * size, group[:full])
            if some:
                keep(free - some * size, group[full : full + 1])
            keep(free, group[full + (some > 0) :])
    result = np.empty_like(bins)
    result[order] = bins
    return result


def pack(starts: Ints, lengths: Ints, capacity: int) -> RowTable:
    """Pack documents given by ``starts`` and ``lengths`` int64 [documents] into rows of ``capacity`` tokens.

    A document longer than a row first fills rows of its own; only its rest is packed. No other document is cut.
    """
    whole = lengths // capacity
    number = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole) - whole, whole)  # of the row in its document
    own = np.repeat(starts, whole) + number * capacity
    rest = lengths % capacity
    kept = rest > 0
    bins = best_fit_decreasing(rest[kept], capacity)
    all_starts = np.concatenate([own, (starts + whole * capacity)[kept]])
    all_lengths = np.concatenate([np.full(own.size, capacity), rest[kept]])
    rows = np.concatenate([np.arange(own.size), own.size + bins])
    order = np.lexsort((all_starts, rows))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return RowTable(
        offsets, all_starts[order], all_lengths[order].astype(np.int32), int(lengths.sum()), int(lengths.size)
    )
