"""The split into stages: exact against brute force, and what it saves where equal counts are uneven."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Model, Parallel
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.pipeline.split import (
    pipeline_stages,
    split_layers,
    split_over_ranks,
    stage_costs,
    stage_ranks,
    stages_of,
)
from megatron_zebra.planning.flops import recompute_flops, train_flops

COSTS = st.lists(st.integers(0, 30), min_size=1, max_size=9)


def all_splits(layers: int, stages: int) -> list[list[int]]:
    return [[b - a for a, b in pairwise([0, *cut, layers])] for cut in combinations(range(1, layers), stages - 1)]


def rank_costs(costs: list[int], ranks: list[int]) -> list[int]:
    return [sum(c for c, r in zip(costs, ranks) if r == rank) for rank in sorted(set(ranks))]


@given(costs=COSTS, first=st.integers(0, 20), last=st.integers(0, 40), data=st.data())
@settings(deadline=None)
def test_the_slowest_stage_is_the_least_possible_and_then_the_counts_the_most_even(
    costs: list[int], first: int, last: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    counts = split_layers(costs, first, last, stages)
    assert len(counts) == stages
    assert sum(counts) == len(costs)
    assert min(counts) >= 1

    def mark(split: list[int]) -> tuple[int, int]:
        return max(stage_costs(costs, first, last, split)), sum(n * n for n in split)

    assert mark(counts) == min(map(mark, all_splits(len(costs), stages)))


def cases() -> Iterator[tuple[list[int], int, int]]:
    """Zebra-like costs, a head, ranks."""
    random = Random(0)
    for _ in range(100):
        pp, local, whole = random.choice([2, 3]), random.choice([3, 5]), random.choice([7, 11, 20])
        group, layers = random.randint(2, 6), random.randint(2 * pp, 11)
        yield [whole if i % group == 0 else local for i in range(layers)], random.randint(0, 25), pp


@pytest.mark.parametrize("v", [True, False])
def test_several_stages_a_rank_are_balanced_over_ranks(v: bool) -> None:
    over = []
    for costs, head, pp in cases():
        ranks = stage_ranks(pp, 2, v=v)
        counts = split_over_ranks(costs, 0, head, ranks)
        assert sum(counts) == len(costs)
        assert min(counts) >= 1

        def slowest(split: list[int], costs: list[int] = costs, head: int = head, ranks: list[int] = ranks) -> int:
            return max(rank_costs(stage_costs(costs, 0, head, split), ranks))

        assert slowest(counts) <= slowest(split_layers(costs, 0, head, len(ranks)))
        over.append(slowest(counts) / min(map(slowest, all_splits(len(costs), len(ranks)))))
    assert sum(ratio > 1 for ratio in over) <= 3
    assert max(over) < 1.15


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be split into 4 stages"):
        split_layers([1, 1, 1], 0, 0, 4)


def model(layers: int, length: int) -> Architecture:
    """As Llama-3-8B, with L = 4 and w = 512."""
    keys = {"hidden_size": 4096, "num_layers": layers, "num_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 14336}
    return resolve(Model.model_validate(keys), 128256, length)


def equal_counts(layers: int, stages: int) -> list[int]:
    """As frameworks do it: the remainder to the first stages."""
    return [layers // stages + (s < layers % stages) for s in range(stages)]


# (layers, pp, slowest stage of equal counts over the mean, of the chosen split, its counts), worked out at S = 32k
SIX = [
    (32, 8, 1.424, 1.264, [4, 4, 4, 4, 4, 4, 5, 3]),
    (32, 16, 1.788, 1.469, [2] * 14 + [3, 1]),
    (32, 6, 1.221, 1.102, [5, 5, 6, 6, 6, 4]),
    (30, 4, 1.137, 1.029, [8, 8, 8, 6]),
    (30, 8, 1.285, 1.069, [4] * 7 + [2]),
]


@pytest.mark.parametrize(("layers", "pp", "before", "after", "counts"), SIX)
def test_S06_by_cost_against_equal_counts(layers: int, pp: int, before: float, after: float, counts: list[int]) -> None:
    arch = model(layers, 32768)
    equal = pipeline_stages(Parallel(pp=pp, pp_layers=equal_counts(layers, pp)), arch, 32768)
    chosen = pipeline_stages(Parallel(pp=pp), arch, 32768)
    assert sum(chosen.costs) == sum(equal.costs) == train_flops(arch, [32768]).total
    assert [len(r) for r in equal.layers] == equal_counts(layers, pp)
    assert [len(r) for r in chosen.layers] == counts
    assert equal.slowest_over_mean == pytest.approx(before, abs=0.001)
    assert chosen.slowest_over_mean == pytest.approx(after, abs=0.001)


def test_S06_long_rows_weigh_global_layers_and_not_the_head() -> None:
    arch = model(32, 2**20)
    chosen = pipeline_stages(Parallel(pp=8), arch, 2**20)
    assert [sum(arch.layer_kinds[i] == "global" for i in layers) for layers in chosen.layers] == [1] * 8
    assert chosen.slowest_over_mean < 1.1


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_who_holds_what(schedule: str) -> None:
    arch = model(32, 8192)
    stages = pipeline_stages(Parallel.model_validate({"pp": 4, "pp_schedule": schedule}), arch, 8192)
    held = {
        "1f1b": [[0], [1], [2], [3]],
        "interleaved": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "zero_bubble": [[0, 7], [1, 6], [2, 5], [3, 4]],
    }
    assert [stages.of_rank(rank) for rank in range(4)] == held[schedule]
    assert sorted(i for rank in range(stages.pp) for i in stages.layers_of_rank(rank)) == list(range(32))
    assert sum(stages.rank_costs) == sum(stages.costs)
    assert 1 <= stages.slowest_over_mean < 1.3


def test_without_a_pipeline_one_stage_has_everything() -> None:
    for schedule in ("1f1b", "interleaved", "zero_bubble"):
        config = load_config(None, {"parallel.pp_schedule": schedule, "training.recompute": "full"})
        arch = resolve(config.model, 32000, 2048)
        stages = stages_of(config, arch)
        assert stages.layers == (range(8),)
        assert stages.ranks == (0,)
        assert stages.slowest_over_mean == 1
        assert stages.costs == (train_flops(arch, [2048]).total + recompute_flops(arch, [2048], "full"),)


def test_a_large_model() -> None:
    arch = resolve(Model(num_layers=128, hidden_size=16384, num_heads=128), 128256, 2**20)
    for schedule in ("1f1b", "interleaved", "zero_bubble"):
        stages = pipeline_stages(Parallel.model_validate({"pp": 16, "pp_schedule": schedule}), arch, 2**20)
        assert sum(len(layers) for layers in stages.layers) == 128
        assert stages.slowest_over_mean < 1.05
