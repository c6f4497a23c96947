"""One optimizer step: what is computed, and what is known afterwards."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_zebra.data.batch import LocalBatch, MicroBatch
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import StepResult
from megatron_zebra.parallel.process import sum_over
from megatron_zebra.training.build import Trained


@dataclass(frozen=True)
class StepOutcome:
    """Sums over the global batch, the same on every rank; ``compute_time`` and ``optimizer_time`` are this rank's seconds.

    ``accepted``: the loss was one that may update the weights. ``own_times``: by rank, seconds of this step that it did not wait for others, by the clock of its host.

    ``loss`` is the mean cross entropy; ``distill_loss`` the mean divergence from the teacher (0 without one).
    """

    loss: float
    distill_loss: float
    targets: int
    tokens: int
    flops: float
    source_losses: dict[int, float]
    result: StepResult
    stop_wanted: bool
    compute_time: float
    optimizer_time: float
    own_times: list[float]
    accepted: bool


def train_step(
    trained: Trained,
    micro_batches: Sequence[MicroBatch],
    learning_rate: float,
    grid: Grid,
    num_sources: int,
    flops: Callable[[np.ndarray], float],
    stop_wanted: Callable[[], bool] = lambda: False,
    accept: Callable[[float], bool] | None = None,
    data_time: float = 0.0,
) -> StepOutcome:
    """Forward and backward of this rank's micro-batches, then one update.

    The loss is the sum over the global batch divided by its number of targets, however it is cut into ranks and
    micro-batches: each backward is scaled by ranks / targets, because gradients are averaged over ``grid.data``.

    Args:
        flops: model FLOPs of segments of the given lengths [n].
        stop_wanted: asked once, after the update; true on any rank counts for all.
        accept: whether a step of this loss may update the weights; None: every one may, and no rank asks for it first.
        data_time: seconds that this rank waited for the micro-batches.
    """
    began = time.perf_counter()
    device = grid.device
    batches = [batch.here(device, trained.context) for batch in micro_batches]
    targets = grid.data.all_reduce(torch.tensor(sum(batch.targets for batch in batches), device=device))
    losses = torch.zeros(num_sources, dtype=torch.float64, device=device)
    counts = torch.zeros(num_sources, dtype=torch.float64, device=device)
    apart = torch.zeros(1, dtype=torch.float64, device=device)
    for batch, loss in zip(batches, trained.runner.train(batches, grid.data.size / targets.clamp_min(1))):
        if loss is not None and grid.tp.rank == 0:  # the others have the same
            _add_by_source(losses, counts, batch, loss.tokens)
            if loss.apart is not None:
                apart += loss.apart.sum(dtype=torch.float64)
    own_time = data_time + time.perf_counter() - began - grid.traffic.seconds
    update = accept is None or accept(sum(sum_over(losses.tolist(), device)) / max(1, int(targets)))
    computed = time.perf_counter()
    result = trained.optimizer.step(learning_rate, update)
    done = time.perf_counter()
    first = grid.is_first_of_replica
    own = [
        float(sum(batch.tokens.numel() for batch in micro_batches) if first else 0),
        float(sum(flops(np.diff(batch.cu_seqlens)) for batch in micro_batches) if first else 0),
        float(stop_wanted()),
    ]
    times = [own_time if rank == grid.rank else 0.0 for rank in range(grid.world_size)]
    totals = sum_over([*own, *apart.tolist(), *losses.tolist(), *counts.tolist(), *times], device)
    by_source, count_by_source = totals[4 : 4 + num_sources], totals[4 + num_sources : 4 + 2 * num_sources]
    return StepOutcome(
        loss=sum(by_source) / max(1, int(targets)),
        distill_loss=totals[3] / max(1, int(targets)),
        targets=int(targets),
        tokens=int(totals[0]),
        flops=totals[1],
        source_losses={i: s / n for i, (s, n) in enumerate(zip(by_source, count_by_source)) if n},
        result=result,
        stop_wanted=totals[2] > 0,
        compute_time=computed - began,
        optimizer_time=done - computed,
        own_times=totals[4 + 2 * num_sources :],
        accepted=update,
    )


def _add_by_source(losses: torch.Tensor, counts: torch.Tensor, batch: LocalBatch, token_losses: torch.Tensor) -> None:
    """Add each row's sum of losses and number of targets to its source's."""
    sources = torch.from_numpy(batch.sources).to(losses.device)
    rows = len(batch.sources)
    losses.index_add_(0, sources, token_losses.view(rows, -1).sum(1, dtype=torch.float64))
    counts.index_add_(0, sources, (batch.labels != -100).view(rows, -1).sum(1, dtype=torch.float64))
