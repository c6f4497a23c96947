"""Who holds which layers in a pipeline, and what that costs. Pure data; ``pipeline.split`` makes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline in order, each a run of layers. The first has the embedding, the last norm and head.

    layers: of each stage, by global number.
    costs: of each stage, FLOPs of a training step over one row.
    ranks: the pipeline rank that holds each stage.
    """

    layers: tuple[range, ...]
    costs: tuple[int, ...]
    ranks: tuple[int, ...]

    @staticmethod
    def whole(num_layers: int, cost: int = 1) -> "Stages":
        """Without a pipeline: one stage of all layers."""
        return Stages((range(num_layers),), (cost,), (0,))

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return max(self.ranks) + 1

    def of_rank(self, rank: int) -> list[int]:
        """Numbers of the stages that pipeline rank ``rank`` holds, ascending."""
        return [stage for stage, holder in enumerate(self.ranks) if holder == rank]

    def layers_of_rank(self, rank: int) -> list[int]:
        """Global numbers of the layers that pipeline rank ``rank`` holds, ascending."""
        return [layer for stage in self.of_rank(rank) for layer in self.layers[stage]]

    @property
    def rank_costs(self) -> list[int]:
        """Of each pipeline rank: its stages' costs together."""
        return [sum(self.costs[stage] for stage in self.of_rank(rank)) for rank in range(self.pp)]

    @property
    def slowest_over_mean(self) -> float:
        """What the pipeline's step is longer than with equal ranks, bubbles apart; 1 is even."""
        return max(self.rank_costs) * self.pp / sum(self.rank_costs)


def in_flight(stages: Stages, schedule: str, micro_batches: int, rank: int) -> dict[int, int]:
    """Micro-batches whose activations pipeline rank ``rank`` holds at its fullest, by stage.

    Follows torch 2.13's schedules: 1F1B holds one for each stage that is still to come; interleaved fills its warm-up,
    stage after stage; zero-bubble (ZBV) twice as many as there are ranks, most of them in its outer stage.
    """
    held, pp = stages.of_rank(rank), stages.pp
    if schedule == "interleaved" and pp > 1:
        per_round = micro_batches // max(1, micro_batches // pp)
        warm_up = (len(held) - 1) * per_round + 2 * (pp - 1 - rank)
        steps = range(min(warm_up + 1, micro_batches * len(held)))
        filled = [held[step // per_round % len(held)] for step in steps]
        return {stage: filled.count(stage) for stage in held}
    if schedule == "zero_bubble" and pp > 1:
        outer, inner = held
        return {outer: min(micro_batches, 2 * pp - 1 - rank), inner: min(micro_batches, rank + 1)}
    return {stage: min(micro_batches, len(stages) - stage) for stage in held}
