"""Contiguous stages, chosen so that the slowest costs least at the trained length. Pure: no torch.

A layer costs its training FLOPs over one row that is one document (``planning.flops``: a local layer only its window's
pairs), and what ``training.recompute`` computes again; the head is counted with the last stage; the embedding is a
lookup and costs nothing.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from megatron_zebra.config.derived import longest_sequence, stages_per_rank
from megatron_zebra.config.sections import Config, Parallel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.planning.flops import head_flops, layer_flops, recomputed
from megatron_zebra.planning.stages import Stages

_EXACT = 2**40  # costs are compared in units in which they, and their squares, are well within a float64
_FEW_STAGES = 16  # two layers move at once in stages^4 ways


def stages_of(config: Config, arch: Architecture) -> Stages:
    """The stages of a run, balanced for its longest rows. Every part of the system asks this one function."""
    return pipeline_stages(config.parallel, arch, longest_sequence(config), config.training.recompute)


def pipeline_stages(parallel: Parallel, arch: Architecture, sequence_length: int, recompute: str = "none") -> Stages:
    """The stages under ``parallel``, which must have passed ``config.check``; without a pipeline one of all layers.

    Args:
        sequence_length: tokens of a row, the length that stages are balanced for.
        recompute: ``training.recompute``.
    """
    layers = [f.times(3).total + recomputed(arch, f, recompute) for f in layer_flops(arch, [sequence_length])]
    head = head_flops(arch, sequence_length).times(3).total
    ranks = stage_ranks(parallel.pp, stages_per_rank(parallel), v=parallel.pp_schedule == "zero_bubble")
    if parallel.pp == 1:
        counts = [arch.num_layers]
    elif parallel.pp_layers is not None:
        counts = list(parallel.pp_layers)
    else:
        counts = split_over_ranks(layers, 0, head, ranks)
    ends = [0, *accumulate(counts)]
    return Stages(
        layers=tuple(range(start, end) for start, end in pairwise(ends)),
        costs=tuple(stage_costs(layers, 0, head, counts)),
        ranks=tuple(ranks),
    )


def stage_ranks(pp: int, per_rank: int, v: bool = False) -> list[int]:
    """The rank of each stage, as torch's schedules have it: round and round, or (``v``) forth and back."""
    if v and per_rank == 2:
        return [*range(pp), *reversed(range(pp))]
    return [*range(pp)] * per_rank


def stage_costs(costs: Sequence[int], first_extra: int, last_extra: int, counts: Sequence[int]) -> list[int]:
    """What stages of ``counts`` layers cost, where layer i costs ``costs[i]``."""
    prefix = [0, *accumulate(costs)]
    found = [prefix[end] - prefix[start] for start, end in pairwise([0, *accumulate(counts)])]
    found[0] += first_extra
    found[-1] += last_extra
    return found


def split_layers(costs: Sequence[int], first_extra: int, last_extra: int, stages: int) -> list[int]:
    """How many layers each of ``stages`` contiguous stages gets, at least one, so that the most costly costs least.

    Exact. Among equals the most even counts (the least sum of squares); among those the fewest layers in early stages,
    which hold more micro-batches. ``first_extra`` and ``last_extra`` are costs of the first and the last stage of
    their own. ValueError if there are fewer layers than stages.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise ValueError(f"{n} layers cannot be split into {stages} stages")
    parts = [*costs]
    parts[0] += first_extra
    parts[-1] += last_extra
    prefix = [0, *accumulate(parts)]
    limit = _bottleneck(parts, stages)
    # reach[i]: the first layer of the longest stage that ends before layer i and costs at most the limit.
    reach, start = [], 0
    for end in range(n + 1):
        while prefix[end] - prefix[start] > limit:
            start += 1
        reach.append(start)
    longest = np.arange(n + 1) - np.array(reach)
    # squares[i]: least sum of squared counts of the stages so far, over the first i layers.
    squares = np.full(n + 1, np.inf)
    squares[0] = 0
    chosen = []
    for _ in range(stages):
        best, count = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        for layers in range(1, int(longest.max()) + 1):
            total = np.full(n + 1, np.inf)
            total[layers:] = squares[:-layers] + layers**2
            better = (total <= best) & (layers <= longest)
            best[better], count[better] = total[better], layers
        squares = best
        chosen.append(count)
    counts, end = [], n
    for count in reversed(chosen):
        counts.append(int(count[end]))
        end -= counts[-1]
    return counts[::-1]


def split_over_ranks(costs: Sequence[int], first_extra: int, last_extra: int, ranks: Sequence[int]) -> list[int]:
    """``split_layers`` where stage s is held by ``ranks[s]``: the slowest rank counts first, then the slowest stage.

    With one stage a rank this is exact. With several it starts from the split that is best by stages and from even
    counts, and moves layers between stages as long as that helps: against brute force nearly always the best (2 of
    100 small cases are not).
    """
    stages = len(ranks)
    counts = split_layers(costs, first_extra, last_extra, stages)
    if len(set(ranks)) == stages:
        return counts
    even = [len(costs) * (s + 1) // stages - len(costs) * s // stages for s in range(stages)]
    judge = _Judge(costs, first_extra, last_extra, ranks)
    by_stage, by_count = (judge.descend(np.array(start)) for start in (counts, even))
    found: list[int] = (by_count if judge.better(by_count, by_stage) else by_stage).tolist()
    return found


class _Judge:
    """Compares splits: slowest rank, slowest stage, evenness of ranks, evenness of counts; less is better."""

    def __init__(self, costs: Sequence[int], first_extra: int, last_extra: int, ranks: Sequence[int]) -> None:
        unit = max(1, (sum(costs) + first_extra + last_extra) // _EXACT)
        self.prefix = np.array([0, *accumulate(costs)]) // unit
        self.first, self.last = first_extra // unit, last_extra // unit
        self.by_rank = np.argsort(ranks, kind="stable")
        self.pp = len(set(ranks))

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """counts [splits, stages] -> [splits, 4]."""
        ends = np.cumsum(counts, axis=1)
        cost = (self.prefix[ends] - self.prefix[ends - counts]).astype(np.float64)
        cost[:, 0] += self.first
        cost[:, -1] += self.last
        rank = cost[:, self.by_rank].reshape(len(counts), self.pp, -1).sum(2)
        return np.stack([rank.max(1), cost.max(1), (rank**2).sum(1), (counts**2.0).sum(1)], axis=1)

    def descend(self, counts: np.ndarray) -> np.ndarray:
        """The best split within reach: a layer moves from any stage to any other; where none helps, two layers."""
        stages = len(counts)
        one = np.eye(stages, dtype=np.int64)
        single = (one[:, None] - one[None]).reshape(-1, stages)
        double = (single[:, None] + single[None]).reshape(-1, stages) if stages <= _FEW_STAGES else single
        while True:
            for moves in (single, double):
                near = counts + moves
                near = near[(near >= 1).all(1)]
                best = near[np.lexsort(self(near).T[::-1])[0]]
                if self.better(best, counts):
                    counts = best
                    break
            else:
                return counts

    def better(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether split ``a`` is better than ``b``."""
        first, second = self(np.stack([a, b])).tolist()
        return bool(first < second)


def _bottleneck(parts: Sequence[int], stages: int) -> int:
    """The least limit under which ``parts`` fit into ``stages`` contiguous stages (more stages never cost more)."""
    low, high = max(parts), sum(parts)
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(parts, middle) <= stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_needed(parts: Sequence[int], limit: int) -> int:
    """Stages of at most ``limit``, each filled as far as it goes."""
    needed, filled = 1, 0
    for part in parts:
        if filled + part > limit:
            needed, filled = needed + 1, 0
        filled += part
    return needed
