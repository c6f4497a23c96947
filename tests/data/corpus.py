"""A source in memory and a brute-force model of rows, for the tests of this folder."""

import numpy as np
from hypothesis import settings

from megatron_zebra.data.rows import IGNORE, Row

patient = settings(deadline=None, max_examples=50)  # the machine may be busy


class ListSource:
    """Documents given as lengths; token t of the source has the id t, so that a row shows where it came from.

    ``counted`` bool [tokens] is the loss mask.
    """

    name = "list"
    cache_dir = None

    def __init__(self, lengths: list[int], counted: np.ndarray | None = None) -> None:
        self.documents = len(lengths)
        self._bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = int(self._bounds[-1])
        self.counted = counted
        self.reads: list[int] = []  # sizes, to see what a row costs

    @property
    def fingerprint(self) -> str:
        counted = None if self.counted is None else self.counted.tolist()
        return f"list:{self._bounds.tolist()}:{counted}"

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        self.reads.append(stop - start)
        return np.arange(start, stop)

    def read_mask(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.counted is None else self.counted[start:stop]

    def bounds(self, start: int, stop: int) -> np.ndarray:
        return np.unique(self._bounds[(self._bounds > start) & (self._bounds <= stop)])

    def document_bounds(self) -> np.ndarray:
        return self._bounds

    def document_of(self, token: int) -> int:
        """The document that holds a token."""
        return int(np.searchsorted(self._bounds, token, "right")) - 1


def check_row(row: Row, source: ListSource, length: int) -> None:
    """Labels, positions and lengths of a row whose tokens are given, token by token."""
    assert row.tokens.shape == row.labels.shape == row.positions.shape == (length,)
    assert row.lengths.sum() == length
    assert (row.lengths > 0).all()
    used = length - row.padding
    position = 0
    starts = set((np.cumsum(row.lengths) - row.lengths).tolist())
    for place in range(used):
        token = int(row.tokens[place])
        goes_on = place > 0 and token == row.tokens[place - 1] + 1
        goes_on = goes_on and source.document_of(token) == source.document_of(token - 1)
        position = position + 1 if goes_on and place not in starts else 0
        assert (place in starts) == (position == 0)
        assert goes_on == (position > 0)  # segments end only where documents or spans do
        assert row.positions[place] == position
        last = token + 1 == source.tokens or source.document_of(token + 1) != source.document_of(token)
        ignored = last or (source.counted is not None and not source.counted[token + 1])
        assert row.labels[place] == (IGNORE if ignored else token + 1)
    assert (row.labels[used:] == IGNORE).all()
    assert row.positions[used:].tolist() == list(range(row.padding))
