"""One optimizer step: what is computed, and what is known afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_zebra.data.batch import MicroBatch
from megatron_zebra.model.decoder import Loss
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import ShardedOptimizer, StepResult
from megatron_zebra.parallel.process import sum_over


@dataclass(frozen=True)
class StepOutcome:
    """Sums over the global batch, the same on every rank."""

    loss: float
    targets: int
    tokens: int
    flops: float
    source_losses: dict[int, float]
    result: StepResult
    stop_wanted: bool


def train_step(
    optimizer: ShardedOptimizer,
    micro_batches: Sequence[MicroBatch],
    learning_rate: float,
    grid: Grid,
    num_sources: int,
    flops: Callable[[np.ndarray], float],
    stop_wanted: Callable[[], bool] = lambda: False,
) -> StepOutcome:
    """Forward and backward of this rank's micro-batches, then one update.

    The loss is the sum over the global batch divided by its number of targets, however it is cut into ranks and
    micro-batches: each backward is scaled by ranks / targets, because gradients are averaged over ranks.

    Args:
        flops: model FLOPs of segments of the given lengths [n].
        stop_wanted: asked once, after the update; true on any rank counts for all.
    """
    device = grid.device
    targets = torch.tensor(sum(batch.targets for batch in micro_batches), device=device)
    dist.all_reduce(targets)
    scale = grid.dp_size / targets.clamp_min(1)
    losses = torch.zeros(num_sources, dtype=torch.float64, device=device)
    counts = torch.zeros(num_sources, dtype=torch.float64, device=device)
    for batch in micro_batches:
        loss: Loss = optimizer.forward(*batch.inputs(device))
        optimizer.backward(loss.sum * scale)
        _add_by_source(losses, counts, batch, loss.tokens)
    result = optimizer.step(learning_rate)
    own = [
        float(sum(batch.tokens.numel() for batch in micro_batches)),
        float(sum(flops(np.diff(batch.cu_seqlens)) for batch in micro_batches)),
        float(stop_wanted()),
    ]
    totals = sum_over([*own, *losses.tolist(), *counts.tolist()], device)
    by_source, count_by_source = totals[3 : 3 + num_sources], totals[3 + num_sources :]
    return StepOutcome(
        loss=sum(by_source) / max(1, int(targets)),
        targets=int(targets),
        tokens=int(totals[0]),
        flops=totals[1],
        source_losses={i: s / n for i, (s, n) in enumerate(zip(by_source, count_by_source)) if n},
        result=result,
        stop_wanted=totals[2] > 0,
    )


def _add_by_source(losses: torch.Tensor, counts: torch.Tensor, batch: MicroBatch, token_losses: torch.Tensor) -> None:
    """Add each row's sum of losses and number of targets to its source's."""
    sources = torch.from_numpy(batch.sources).to(losses.device)
    losses.index_add_(0, sources, token_losses.view(batch.rows, -1).sum(1, dtype=torch.float64))
    valid = batch.labels.to(losses.device).view(batch.rows, -1) != -100
    counts.index_add_(0, sources, valid.sum(1, dtype=torch.float64))
