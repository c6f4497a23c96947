"""Loss of a model over a data set, in all and by position in the document."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_zebra.data.batch import MicroBatch, collate
from megatron_zebra.data.rows import OnePass
from megatron_zebra.model.decoder import Loss
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import sum_over


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
    forward: Callable[..., Loss],
    rows: OnePass,
    micro_batch_size: int,
    grid: Grid,
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
    step = micro_batch_size * grid.dp_size
    for first in range(0, len(rows), step):
        # Rows past the end are padding without a target: under ZeRO-3 every rank must take part in every forward.
        batch = collate([rows.read(row) for row in range(first + grid.dp_rank, first + step, grid.dp_size)])
        loss = forward(*batch.inputs(grid.device))
        _add_by_position(losses, counts, bounds, batch, loss.tokens)
        progress(batch.rows)
    totals = sum_over([*losses.tolist(), *counts.tolist()], grid.device)
    bin_losses, bin_targets = totals[: len(losses)], [int(n) for n in totals[len(losses) :]]
    return Evaluated(float(np.sum(bin_losses)), sum(bin_targets), edges, bin_losses, bin_targets)


def _add_by_position(
    losses: torch.Tensor, counts: torch.Tensor, bounds: torch.Tensor, batch: MicroBatch, token_losses: torch.Tensor
) -> None:
    bins = torch.bucketize(batch.positions.to(bounds.device), bounds, right=True)
    losses.index_add_(0, bins, token_losses.double())
    counts.index_add_(0, bins, (batch.labels.to(bounds.device) != -100).double())
