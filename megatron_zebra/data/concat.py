"""The order of ``concat`` packing: documents one after another, cut at row ends. A formula; nothing is stored.

The source is repeated for ever: epoch e is the positions [e·T, (e + 1)·T). Unit j is the positions [j·U, (j + 1)·U), U
being the least common multiple of all sequence lengths of the schedule, and belongs to the epoch in which it starts. The
units of an epoch are permuted among themselves; a phase takes the next units in that order, cuts each into rows of its
own length and permutes these again, epoch by epoch. Every token is therefore read exactly once an epoch, no phase reads
what an earlier one did, and where rows are cut shifts from epoch to epoch.
"""

from collections.abc import Sequence
from math import lcm

from megatron_zebra.data.permutation import Permutation, derive_key
from megatron_zebra.data.rows import Span


class ConcatOrder:
    """Row ``index`` of phase ``phase`` as spans of a source of ``tokens`` tokens.

    ``phases`` gives for each (rows this source has in it, sequence length); None rows for the last: it has no end, and
    its order does not depend on how many rows will be read. The rest of a phase's last unit is not used.
    """

    def __init__(self, tokens: int, phases: Sequence[tuple[int | None, int]], key: int) -> None:
        self._tokens, self._key = tokens, key
        self._unit = lcm(*(length for _, length in phases))
        self._lengths = [length for _, length in phases]
        self._edges: list[int | None] = [0]  # phase k takes the units edges[k] .. edges[k + 1]; None: no end
        for rows, length in phases:
            first = self._edges[-1]
            if first is None:
                raise ValueError("only the last phase may be without an end")
            self._edges.append(None if rows is None else first + -(-rows * length // self._unit))

    def spans(self, phase: int, index: int) -> list[Span]:
        """One span; more where the row goes over the end of the source."""
        length = self._lengths[phase]
        rows = self._unit // length  # of this phase's length, in a unit
        begin, end = self._edges[phase], self._edges[phase + 1]
        assert begin is not None
        epoch = (begin + index // rows) * self._unit // self._tokens
        first, last = self._first_unit(epoch), self._first_unit(epoch + 1)
        low = max(begin, first)
        high = last if end is None else min(end, last)
        shuffle = Permutation((high - low) * rows, derive_key(self._key, "rows", phase, epoch))
        row = shuffle(index - (low - begin) * rows)
        units = Permutation(last - first, derive_key(self._key, "units", epoch))
        unit = first + units(low + row // rows - first)
        start = unit * self._unit + row % rows * length
        return wrap(start, start + length, self._tokens)

    def _first_unit(self, epoch: int) -> int:
        return -(-epoch * self._tokens // self._unit)


def wrap(start: int, stop: int, tokens: int) -> list[Span]:
    """Positions [start, stop) of a stream that repeats ``tokens`` tokens for ever, as spans of one repeat."""
    spans = []
    while start < stop:
        end = min(stop, (start // tokens + 1) * tokens)
        offset = start % tokens
        spans.append((offset, offset + end - start))
        start = end
    return spans
