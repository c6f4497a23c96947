"""The grid of ranks, against a plain enumeration of coordinates."""

import itertools
from typing import Any

import pytest
import torch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.layout import AXES, Layout


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 2, 2), (1, 4, 1, 2), (2, 2, 2, 2), (3, 1, 2, 1)])
def test_groups_are_the_ranks_that_differ_in_their_axes_alone(sizes: tuple[int, int, int, int]) -> None:
    layout = Layout(*sizes)
    places = {layout.coordinates(rank): rank for rank in range(layout.world_size)}
    assert list(places) == list(itertools.product(*map(range, sizes)))
    for count in range(1, 5):
        for axes in itertools.combinations(AXES, count):
            expected: dict[Any, list[int]] = {}
            for place, rank in places.items():
                rest = tuple(getattr(place, axis) for axis in AXES if axis not in axes)
                expected.setdefault(rest, []).append(rank)
            assert sorted(layout.groups(*axes)) == sorted(expected.values())


def test_dp_follows_from_the_rest() -> None:
    assert Layout.of(16, tp=2, cp=2, pp=2) == Layout(2, 2, 2, 2)
    with pytest.raises(ValueError, match="6 ranks"):
        Layout.of(6, tp=4)


def sums(grid: Grid) -> dict[str, tuple[list[int], float]]:
    groups = {name: getattr(grid, name) for name in ("world", "tp", "cp", "pp", "data", "model", "ends")}
    return {name: (list(g.ranks), float(g.all_reduce(torch.tensor(float(grid.rank))))) for name, g in groups.items()}


def test_every_group_sums_over_its_own_ranks(run_distributed: Any) -> None:
    for rank, groups in enumerate(run_distributed(sums, 8, tp=2, cp=2, pp=2)):
        assert groups["data"][0] == [r for r in range(8) if (r // 4, r % 2) == (rank // 4, rank % 2)]
        assert groups["model"][0] == [r for r in range(8) if (r // 2) % 2 == (rank // 2) % 2]
        assert groups["ends"][0] == groups["pp"][0] == [rank % 4, rank % 4 + 4]
        for ranks, total in groups.values():
            assert rank in ranks
            assert total == sum(ranks)
