"""A source cut down to its documents of certain lengths, so that a blend can give long documents a larger share."""

from pathlib import Path

import numpy as np

from megatron_zebra.data.source import Mask, Source, Tokens
from megatron_zebra.errors import UserError


class NoDocumentLeft(UserError):
    """No document of a source has a length within the bounds."""


class LengthFilter:
    """The documents of ``source`` that have ``minimum`` to ``maximum`` tokens (None: no bound), as a source of their own.

    Opening it takes time and memory in proportion to the documents, reading to what is read. A document keeps its end: no
    target reaches from one that was kept into another.

    Raises:
        NoDocumentLeft: saying which lengths there are.
    """

    def __init__(self, source: Source, minimum: int | None = None, maximum: int | None = None) -> None:
        bounds = source.document_bounds()
        lengths = np.diff(bounds)
        kept = lengths > 0
        if minimum is not None:
            kept &= lengths >= minimum
        if maximum is not None:
            kept &= lengths <= maximum
        if not kept.any():
            raise NoDocumentLeft(
                f"{source.name}: none of its {lengths.size} documents has {_range(minimum, maximum)} tokens; they have "
                f"{lengths.min()} to {lengths.max()}, half of them at most {int(np.median(lengths))} "
                "(min_document_tokens, max_document_tokens)"
            )
        self.name = source.name
        self.cache_dir: Path | None = source.cache_dir
        self.documents = int(kept.sum())
        self._source, self._limits = source, (minimum, maximum)
        self._bounds = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        self._shift = bounds[:-1][kept] - self._bounds[:-1]  # from an offset of this source to one of ``source``
        self.tokens = int(self._bounds[-1])

    @property
    def fingerprint(self) -> str:
        minimum, maximum = self._limits
        return f"{self._source.fingerprint}:{minimum}..{maximum}"

    def read(self, start: int, stop: int) -> Tokens:
        return np.concatenate([self._source.read(*span) for span in self._spans(start, stop)])

    def read_mask(self, start: int, stop: int) -> Mask | None:
        parts = [mask for span in self._spans(start, stop) if (mask := self._source.read_mask(*span)) is not None]
        return np.concatenate(parts) if parts else None

    def bounds(self, start: int, stop: int) -> Tokens:
        first, last = np.searchsorted(self._bounds, [start, stop], "right")
        return self._bounds[first:last]

    def document_bounds(self) -> Tokens:
        return self._bounds

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) as spans of the source, documents that lie side by side in one; one empty span if it is empty."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} outside [0, {self.tokens}]")
        first = min(int(np.searchsorted(self._bounds, start, "right")) - 1, self.documents - 1)
        last = max(first + 1, int(np.searchsorted(self._bounds, stop, "left")))
        shift = self._shift[first:last]
        cuts = np.flatnonzero(np.diff(shift)) + 1
        edges = np.concatenate([[start], self._bounds[first + cuts], [stop]])
        moved = shift[np.concatenate([[0], cuts])]
        return list(zip((edges[:-1] + moved).tolist(), (edges[1:] + moved).tolist()))


def _range(minimum: int | None, maximum: int | None) -> str:
    if minimum is None:
        return f"at most {maximum}"
    return f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
