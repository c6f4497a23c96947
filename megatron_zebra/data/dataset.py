"""The order of training data: row number -> phase, source, spans -> Row. A pure function of the seed and the number."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Literal, Protocol

from megatron_zebra.data.best_fit import BestFitOrder
from megatron_zebra.data.blend import Blend
from megatron_zebra.data.concat import ConcatOrder
from megatron_zebra.data.permutation import derive_key
from megatron_zebra.data.rows import Row, Span, build_row
from megatron_zebra.data.source import Source
from megatron_zebra.errors import UserError

Packing = Literal["concat", "best_fit"]


@dataclass(frozen=True)
class Phase:
    """A part of the sequence-length schedule; ``rows`` is None for the last, which has no end.

    ``weights`` replace those of the blend in this phase; a weight of 0 leaves a source out.
    """

    rows: int | None
    sequence_length: int
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Location:
    """Where a row comes from: the phase, the source, and its index among the source's rows of that phase."""

    phase: int
    source: int
    index: int


class Order(Protocol):
    """The order of the rows of one source."""

    def spans(self, phase: int, index: int) -> list[Span]:
        """The spans of the source that make up row ``index`` of a phase."""


class Dataset:
    """All rows of a training run, by number from 0 on and without end.

    ``sources`` and their ``weights`` (default: equal) are blended by rows; ``phases`` are consecutive. Sources keep their
    places over phases, so a phase reads tokens that earlier ones did not. ``packing`` best_fit keeps its index in
    ``cache_dir``, by default beside each source. Errors in the arguments are UserErrors.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        seed: int,
        weights: Sequence[float] | None = None,
        packing: Packing = "concat",
        attend_across_documents: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        _check(sources, phases, weights)
        self.sources = list(sources)
        self.phases = list(phases)
        self._attend_across_documents = attend_across_documents
        self._starts = [0]  # first row of each phase
        for phase in self.phases[:-1]:
            self._starts.append(self._starts[-1] + (phase.rows or 0))
        shares = [phase.weights or weights or [1.0] * len(sources) for phase in phases]
        self._blends = [Blend(share, derive_key("blend", seed, number)) for number, share in enumerate(shares)]
        rows = [None if p.rows is None else blend.rows_before(p.rows) for p, blend in zip(phases, self._blends)]
        self._orders: list[Order] = []
        for number, source in enumerate(sources):
            uses = [(None if r is None else r[number], p.sequence_length) for p, r in zip(phases, rows)]
            key = derive_key("source", seed, number)
            if packing == "concat":
                _check_unit(source, [phase.sequence_length for phase in phases])
                self._orders.append(ConcatOrder(source.tokens, uses, key))
            else:
                folder = source.cache_dir if cache_dir is None else Path(cache_dir)
                self._orders.append(BestFitOrder(source, uses, key, folder))

    def locate(self, row: int) -> Location:
        """Where row ``row`` comes from."""
        if row < 0:
            raise IndexError(f"row {row}")
        phase = bisect_right(self._starts, row) - 1
        return Location(phase, *self._blends[phase].locate(row - self._starts[phase]))

    def sequence_length(self, row: int) -> int:
        """S of row ``row``."""
        return self.phases[bisect_right(self._starts, row) - 1].sequence_length

    def spans(self, row: int) -> list[Span]:
        """The spans of its source that make up row ``row``."""
        place = self.locate(row)
        return self._orders[place.source].spans(place.phase, place.index)

    def read(self, row: int) -> Row:
        """Row ``row``."""
        place = self.locate(row)
        spans = self._orders[place.source].spans(place.phase, place.index)
        length = self.phases[place.phase].sequence_length
        return build_row(self.sources[place.source], spans, length, place.source, self._attend_across_documents)


def _check(sources: Sequence[Source], phases: Sequence[Phase], weights: Sequence[float] | None) -> None:
    if not sources:
        raise UserError("data: no source to read; give at least one")
    if not phases or phases[-1].rows is not None or any(phase.rows is None for phase in phases[:-1]):
        raise ValueError("exactly the last phase has no end")
    for given in [weights, *(phase.weights for phase in phases)]:
        if given is not None and len(given) != len(sources):
            raise UserError(f"data: {len(given)} weights for {len(sources)} sources; give one weight a source")


def _check_unit(source: Source, lengths: Sequence[int]) -> None:
    """An epoch holds whole units, or parts of it would be read several times and others never (see ``ConcatOrder``)."""
    unit = lcm(*lengths)
    if unit > max(lengths) and unit > source.tokens:
        raise UserError(
            f"data.sequence_schedule: the lengths {', '.join(map(str, sorted(set(lengths))))} have the least common multiple {unit:,}, "
            f"but {source.name} has {source.tokens:,} tokens; choose lengths that divide the longest, or more data"
        )
