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
