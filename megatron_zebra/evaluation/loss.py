"""Loss of a model over a data set, in all and by position in the document."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_zebra.data.batch import LocalBatch, collate
from megatron_zebra.data.rows import OnePass
from megatron_zebra.parallel.context.shard import ContextParallel
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import sum_over
from megatron_zebra.pipeline.runner import Runner


@dataclass(frozen=True)
class Evaluated:
    """Sums over a data set. Bin i holds the targets whose query stands at position edges[i] .. edges[i + 1] - 1."""

    loss_sum: float
    targets: int
    edges: list[int]
    bin_losses: list[float]
    bin_targets: list[int]

    @property
    def loss(self) -> float:
        """Mean loss of a target, in nats."""
        return self.loss_sum / max(1, self.targets)

    def by_position(self) -> list[float | None]:
        """Mean loss of each bin, None where it is empty."""
        return [s / n if n else None for s, n in zip(self.bin_losses, self.bin_targets)]


def position_edges(sequence_length: int) -> list[int]:
    """Bounds of log-spaced bins: 0, 16, 32, 64, ... up to the sequence length."""
    edges = [0, 16]
    while edges[-1] * 2 < sequence_length:
        edges.append(edges[-1] * 2)
    return [edge for edge in edges if edge < sequence_length] + [sequence_length]


@torch.no_grad()
def evaluate(
    runner: Runner,
    rows: OnePass,
    micro_batch_size: int,
    grid: Grid,
    context: ContextParallel | None,
    progress: Callable[[int], object] = lambda rows: None,
) -> Evaluated:
    """Every row once, shared out over the ranks; all ranks run equally many forwards and get the same result.

    Args:
        progress: told the number of rows done by this rank after each micro-batch.
    """
    edges = position_edges(rows.sequence_length(0))
    bounds = torch.tensor(edges[1:-1], device=grid.device)
    losses = torch.zeros(len(edges) - 1, dtype=torch.float64, device=grid.device)
    counts = torch.zeros_like(losses)
    at_once = runner.evaluated_at_once
    step = micro_batch_size * at_once * grid.dp_size
    for first in range(0, len(rows), step):
        # Rows past the end are padding without a target: every rank must take part in every forward.
        own = [rows.read(row) for row in range(first + grid.dp_rank, first + step, grid.dp_size)]
        batches = [
            collate(own[i : i + micro_batch_size]).here(grid.device, context)
            for i in range(0, len(own), micro_batch_size)
        ]
        for batch, token_losses in zip(batches, runner.evaluate(batches)):
            if token_losses is not None and grid.tp.rank == 0:  # the others have the same
                _add_by_position(losses, counts, bounds, batch, token_losses)
        progress(len(own))
    totals = sum_over([*losses.tolist(), *counts.tolist()], grid.device)
    bin_losses, bin_targets = totals[: len(losses)], [int(n) for n in totals[len(losses) :]]
    return Evaluated(float(np.sum(bin_losses)), sum(bin_targets), edges, bin_losses, bin_targets)


def _add_by_position(
    losses: torch.Tensor, counts: torch.Tensor, bounds: torch.Tensor, batch: LocalBatch, token_losses: torch.Tensor
) -> None:
    bins = torch.bucketize(batch.positions, bounds, right=True)
    losses.index_add_(0, bins, token_losses.double())
    counts.index_add_(0, bins, (batch.labels != -100).double())
