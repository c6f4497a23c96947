"""Which rank is where: the world as one array [pp, dp, cp, tp]. Pure; imports no torch.

Ranks of one tensor-parallel group are neighbours, then come context, data and pipeline parallelism: what talks most is
nearest.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

AXES = ("pp", "dp", "cp", "tp")


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the four axes; their product is the number of ranks."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @staticmethod
    def of(world_size: int, *, tp: int = 1, cp: int = 1, pp: int = 1) -> "Layout":
        """dp follows from the rest; ValueError if ``world_size`` is no multiple of tp x cp x pp."""
        if world_size % (tp * cp * pp):
            raise ValueError(f"{world_size} ranks cannot be divided into tp x cp x pp = {tp} x {cp} x {pp}")
        return Layout(pp, world_size // (tp * cp * pp), cp, tp)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.pp, self.dp, self.cp, self.tp

    @property
    def world_size(self) -> int:
        return prod(self.sizes)

    def ranks(self) -> npt.NDArray[np.int64]:
        """Every rank by its coordinates: [pp, dp, cp, tp]."""
        return np.arange(self.world_size, dtype=np.int64).reshape(self.sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` is."""
        return Coordinates(*(int(i) for i in np.unravel_index(rank, self.sizes)))

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ in ``axes`` alone; within a group, the last of AXES runs fastest."""
        inside = [i for i, axis in enumerate(AXES) if axis in axes]
        outside = [i for i in range(len(AXES)) if i not in inside]
        size = prod(self.sizes[i] for i in inside)
        rows: list[list[int]] = self.ranks().transpose(*outside, *inside).reshape(-1, size).tolist()
        return rows

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes))
