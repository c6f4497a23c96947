"""Loss of a model over a data set, in all and by position in the document."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_zebra.data.batch import LocalBatch, collate
from megatron_zebra.data.rows import IGNORE, OnePass
from megatron_zebra.parallel.context.shard import ContextParallel, ContextShard
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import sum_over
from megatron_zebra.pipeline.runner import Runner


@dataclass(frozen=True)
class Evaluated:
    """Sums over a data set. Bin i holds the targets whose query stands at position edges[i] .. edges[i + 1] - 1.

    ``document_losses`` and ``document_targets`` are of each document of the source, where they were asked for.
    """

    loss_sum: float
    targets: int
    edges: list[int]
    bin_losses: list[float]
    bin_targets: list[int]
    document_losses: list[float] = field(default_factory=list)
    document_targets: list[int] = field(default_factory=list)

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
    documents: int = 0,
) -> Evaluated:
    """Every row once, shared out over the ranks; all ranks run equally many forwards and get the same result.

    Args:
        progress: told the number of rows done by this rank after each micro-batch.
        documents: how many the source has, where the loss of each is wanted too.
    """
    edges = position_edges(rows.sequence_length(0))
    bounds = torch.tensor(edges[1:-1], device=grid.device)
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=grid.device)  # losses and targets
    by_document = torch.zeros(2, documents, dtype=torch.float64, device=grid.device)
    at_once = runner.evaluated_at_once
    step = micro_batch_size * at_once * grid.dp_size
    for first in range(0, len(rows), step):
        # Rows past the end are padding without a target: every rank must take part in every forward.
        numbers = range(first + grid.dp_rank, first + step, grid.dp_size)
        parts = [numbers[i : i + micro_batch_size] for i in range(0, len(numbers), micro_batch_size)]
        batches = [collate([rows.read(row) for row in part]).here(grid.device, context) for part in parts]
        for part, batch, token_losses in zip(parts, batches, runner.evaluate(batches)):
            if token_losses is None or grid.tp.rank:  # the other ranks of tp have the same
                continue
            _add(sums, torch.bucketize(batch.positions, bounds, right=True), batch, token_losses)
            if documents:
                of = np.concatenate([rows.documents(row) for row in part])
                if isinstance(batch.segments, ContextShard):
                    of = of[batch.segments.local_index]
                # Padding has no target: in whichever document it counts, it adds nothing.
                _add(by_document, torch.from_numpy(of.clip(0)).to(grid.device), batch, token_losses)
        progress(len(numbers))
    totals = sum_over([*sums.flatten().tolist(), *by_document.flatten().tolist()], grid.device)
    bins = len(edges) - 1
    bin_losses, bin_targets = totals[:bins], [int(n) for n in totals[bins : 2 * bins]]
    of_documents = totals[2 * bins :]
    return Evaluated(
        float(np.sum(bin_losses)),
        sum(bin_targets),
        edges,
        bin_losses,
        bin_targets,
        of_documents[:documents],
        [int(n) for n in of_documents[documents:]],
    )


def _add(sums: torch.Tensor, places: torch.Tensor, batch: LocalBatch, token_losses: torch.Tensor) -> None:
    """Each token's loss and whether it is a target [T] to the two rows of ``sums`` [2, n], at ``places`` [T]."""
    sums[0].index_add_(0, places, token_losses.double())
    sums[1].index_add_(0, places, (batch.labels != IGNORE).double())
