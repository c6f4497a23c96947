"""A row: S tokens with labels, positions and the lengths of its documents, built from spans of a source."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_zebra.data.packing import pack
from megatron_zebra.data.source import Source, Tokens

IGNORE = -100  # label of a position that is no target
PAD = 0  # id of padding; any id would do, since padding is a segment of its own and no target
Span = tuple[int, int]  # tokens [start, stop) of a source


@dataclass(frozen=True)
class Row:
    """S tokens as the model reads them. All arrays are int64 [S], but ``lengths`` [segments], which sum to S.

    ``labels[i]`` is the token after ``tokens[i]`` (the shift precedes any cut of the row), or IGNORE where that token
    belongs to another document or does not count in the loss (the source's mask). ``positions`` restart at each segment; a segment is a document, or the part of one that
    lies in this row. ``padding`` counts the tokens at the end that are no data. ``source`` numbers the blend's sources.
    """

    tokens: Tokens
    labels: Tokens
    positions: Tokens
    lengths: Tokens
    source: int = 0
    padding: int = 0


class RowReader(Protocol):
    """Rows by their number in the order of training (or evaluation): a pure function of the number."""

    def read(self, row: int) -> Row:
        """The row of this number."""

    def sequence_length(self, row: int) -> int:
        """S of this row."""


def build_row(
    source: Source, spans: Sequence[Span], length: int, number: int = 0, attend_across_documents: bool = False
) -> Row:
    """The row that holds these spans one after another, then padding up to ``length`` tokens.

    A span ends a segment, whether or not a document ends there; its last label is the token after it, as long as that
    is of the same document. No label is a token that the source's mask leaves out. ``attend_across_documents`` makes the row one segment and leaves the labels as they are.
    """
    tokens = np.full(length, PAD, np.int64)
    labels = np.full(length, IGNORE, np.int64)
    cuts = []
    filled = 0
    for start, stop in spans:
        read = source.read(start, min(stop + 1, source.tokens))  # one token to look ahead, except at the corpus' end
        end = filled + stop - start
        tokens[filled:end] = read[: stop - start]
        counted = source.read_mask(start, start + read.size)
        labels[filled : filled + read.size - 1] = (
            read[1:] if counted is None else np.where(counted[1:], read[1:], IGNORE)
        )
        bounds = source.bounds(start, stop) + (filled - start)
        labels[bounds - 1] = IGNORE
        cuts += [bounds, np.array([end])]
        filled = end
    if attend_across_documents:
        lengths = np.array([length])
    else:
        lengths = np.diff(np.unique(np.concatenate([[0], *cuts, [length]])))
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(length) - np.repeat(starts, lengths)
    return Row(tokens, labels, positions, lengths, number, length - filled)


class OnePass:
    """Each token of a source once as an input, for evaluation: rows [0, len) in the order of the source, the last padded.

    ``whole_documents``: rows of best-fit packing instead, in which no document that fits a row is cut. ``stride``: sliding
    windows instead. Each document is read in windows of S tokens, every one beginning ``stride`` tokens after the one before,
    and each target counts once, in the first window that has it: all but a document's first S see at least S - stride tokens
    before. With a ``limit`` below the number of rows, that many rows at even distances. Rows from len on are padding without
    a target, so that any number of ranks can read the same number of rows.
    """

    def __init__(
        self,
        source: Source,
        sequence_length: int,
        limit: int | None = None,
        attend_across_documents: bool = False,
        number: int = 0,
        whole_documents: bool = False,
        stride: int | None = None,
    ) -> None:
        self._source, self._length, self._number = source, sequence_length, number
        self._attend_across_documents = attend_across_documents
        self._packed, self._seen_before = None, 0
        if stride is not None:
            self._packed = pack(*_windows(self._bounds, sequence_length, stride), sequence_length)
            self._seen_before = sequence_length - stride
        elif whole_documents:
            self._packed = pack(self._bounds[:-1], np.diff(self._bounds), sequence_length)
        self._rows = -(-source.tokens // sequence_length) if self._packed is None else self._packed.rows
        self._taken = self._rows if limit is None else min(limit, self._rows)

    def __len__(self) -> int:
        return self._taken

    def sequence_length(self, row: int) -> int:
        """S, the same for every row."""
        return self._length

    def read(self, row: int) -> Row:
        """The row of this number."""
        spans = self._spans(row)
        built = build_row(self._source, spans, self._length, self._number, self._attend_across_documents)
        filled = 0
        for start, stop in spans if self._seen_before else ():
            if not self._begins_document(start):
                built.labels[filled : filled + self._seen_before] = IGNORE
            filled += stop - start
        return built

    def documents(self, row: int) -> Tokens:
        """The source's document that each token of a row is of, by number: int64 [S], -1 for padding."""
        of = [np.searchsorted(self._bounds, np.arange(start, stop), "right") - 1 for start, stop in self._spans(row)]
        found = np.concatenate([np.empty(0, np.int64), *of])
        return np.pad(found, (0, self._length - found.size), constant_values=-1)

    @cached_property
    def _bounds(self) -> Tokens:
        return self._source.document_bounds()

    def _spans(self, row: int) -> list[Span]:
        if row >= self._taken:
            return []
        place = row * self._rows // self._taken
        if self._packed is not None:
            return self._packed.spans(place)
        start = place * self._length
        return [(start, min(start + self._length, self._source.tokens))]

    def _begins_document(self, start: int) -> bool:
        return bool(self._bounds[np.searchsorted(self._bounds, start)] == start)


def _windows(bounds: Tokens, length: int, stride: int) -> tuple[Tokens, Tokens]:
    """Starts and lengths of the windows of documents with these ``bounds``; a document's last token has no target."""
    sizes = np.diff(bounds)
    counts = np.where(sizes > 0, 1 + np.maximum(0, -(-(sizes - 1 - length) // stride)), 0)
    number = np.arange(int(counts.sum())) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # of the window in its document
    starts = np.repeat(bounds[:-1], counts) + number * stride
    return starts, np.minimum(length, np.repeat(bounds[1:], counts) - starts)
