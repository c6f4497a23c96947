"""The order of ``best_fit`` packing: documents stay whole, rows are padded at their end.

Without a schedule the documents of the source are packed once, and the rows permuted anew each epoch. With one, a phase
packs the next documents in a seeded order, as many as hold the tokens of its rows, so that no phase reads a document
that an earlier one of the epoch did; the last phase packs what is left of the epoch and then goes on with the whole source.
A phase that does not end its epoch leaves the rows unread that its packing made over: few, as packing wastes little.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_zebra.data.pack_cache import load_or_build
from megatron_zebra.data.packing import RowTable, pack
from megatron_zebra.data.permutation import Permutation, derive_key
from megatron_zebra.data.rows import Span
from megatron_zebra.data.source import Source

_FORMAT = 1  # of the tables; another number gives the files other names


class BestFitOrder:
    """Row ``index`` of phase ``phase`` as spans of a source, for the same ``phases`` as ``ConcatOrder``.

    ``cache_dir`` holds the packed tables; None keeps them in memory.
    """

    def __init__(
        self, source: Source, phases: Sequence[tuple[int | None, int]], key: int, cache_dir: Path | None
    ) -> None:
        self._source, self._key, self._cache_dir = source, key, cache_dir
        self._fingerprint = source.fingerprint
        self._memory: dict[tuple[int, int, int | None], RowTable] = {}
        self._sections: list[
            list[RowTable]
        ] = []  # of each phase, one after another; the last repeats its last for ever
        first = 0  # document, in the seeded order, that the next section begins with
        for rows, length in phases:
            sections = []
            if rows is None:
                if first:
                    sections.append(self._table(length, first, None))
                sections.append(self._table(length, 0, None))
            else:
                need = rows * length
                while need > 0:
                    table = self._table(length, first, None if first == 0 and need >= source.tokens else need)
                    sections.append(table)
                    need -= table.tokens
                    first = (first + table.documents) % source.documents
            self._sections.append(sections)
        self._edges = [np.cumsum([0, *(table.rows for table in sections)]).tolist() for sections in self._sections]

    def spans(self, phase: int, index: int) -> list[Span]:
        """The documents, or parts of long ones, in the row; together at most its length."""
        edges, tables = self._edges[phase], self._sections[phase]
        section = bisect_right(edges, index) - 1
        row = index - edges[min(section, len(tables) - 1)]
        if section >= len(tables) - 1:  # beyond its edges only in the last phase
            more, row = divmod(row, tables[-1].rows)
            section = len(tables) - 1 + more
        table = tables[min(section, len(tables) - 1)]
        return table.spans(Permutation(table.rows, derive_key(self._key, "packed", phase, section))(row))

    def _table(self, length: int, first: int, need: int | None) -> RowTable:
        """Documents from ``first`` on in the seeded order, until they hold ``need`` tokens (None: all), in rows of ``length``."""
        name = (length, first, need)
        if name not in self._memory:
            self._memory[name] = self._load(length, first, need)
        return self._memory[name]

    def _load(self, length: int, first: int, need: int | None) -> RowTable:
        seeded = "" if first == 0 and need is None else f":{self._key}:{first}:{need}"  # the whole needs no order
        text = f"{_FORMAT}:{self._fingerprint}:{length}{seeded}"
        if self._cache_dir is None:
            return self._build(length, first, need)
        path = self._cache_dir / f"best_fit-{hashlib.sha256(text.encode()).hexdigest()[:32]}.rows"
        return load_or_build(path, lambda: self._build(length, first, need))

    def _build(self, length: int, first: int, need: int | None) -> RowTable:
        bounds = self._source.document_bounds()
        starts, lengths = bounds[:-1], np.diff(bounds)
        if first or need is not None:
            order = Permutation(starts.size, derive_key(self._key, "documents")).array(np.arange(first, starts.size))
            starts, lengths = starts[order], lengths[order]
            if need is not None:
                count = int(np.searchsorted(np.cumsum(lengths), need)) + 1
                starts, lengths = starts[:count], lengths[:count]
        return pack(starts, lengths, length)
