"""Blends: which source the next row is from."""

from collections.abc import Sequence
from functools import lru_cache
from math import fsum, inf

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.permutation import derive_key
from megatron_zebra.errors import UserError

PERIOD = 10_000  # rows in which every source has its exact share


def period_counts(weights: Sequence[float], period: int = PERIOD) -> list[int]:
    """Rows of each source in a period: in proportion to the weights, by largest remainder; they sum to ``period``.

    A positive weight gets at least one row, so a share below 1 in 10,000 is rounded up to it.
    """
    if not weights or min(weights) < 0 or not 0 < sum(weights) < inf:
        raise UserError(f"weights of the sources: {list(weights)}: each must be >= 0, their sum positive and finite")
    if sum(weight > 0 for weight in weights) > period:
        raise UserError(f"a blend of {len(weights)} sources: at most {period} are allowed")
    exact = [weight / fsum(weights) * period for weight in weights]
    counts = [max(int(share), int(weight > 0)) for share, weight in zip(exact, weights)]
    missing = period - sum(counts)
    for place in sorted(range(len(counts)), key=lambda n: counts[n] - exact[n])[: max(0, missing)]:
        counts[place] += 1
    while sum(counts) > period:  # many tiny weights were rounded up
        counts[counts.index(max(counts))] -= 1
    return counts


class Blend:
    """Rows of a phase to (source, index within the source's rows of that phase).

    The rows of a source lie evenly through a period, each at a random place of its own stratum, so that every stretch of
    a training run sees nearly the exact shares; the jitter is seeded by ``key`` and the period's number.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        self._key = key
        self._counts = period_counts(weights)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def locate(self, row: int) -> tuple[int, int]:
        """(source, index) of a row."""
        period, place = divmod(row, PERIOD)
        sources, ranks = self._order(period)
        source = int(sources[place])
        return source, period * self._counts[source] + int(ranks[place])

    def rows_before(self, row: int) -> list[int]:
        """How many of the first ``row`` rows each source has."""
        period, place = divmod(row, PERIOD)
        partial = np.bincount(self._order(period)[0][:place], minlength=len(self._counts))
        return [period * count + int(more) for count, more in zip(self._counts, partial)]

    def _make_order(self, period: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each place of a period, its source [PERIOD] and its rank among the rows of that source [PERIOD]."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        ranks = np.concatenate([np.arange(count) for count in self._counts])
        generator = np.random.Generator(np.random.PCG64(derive_key(self._key, "period", period)))
        places = (ranks + generator.random(PERIOD)) / np.repeat(self._counts, self._counts)
        order = np.argsort(places, kind="stable")
        return sources[order], ranks[order]
