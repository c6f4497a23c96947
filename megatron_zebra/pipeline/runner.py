"""Forward and backward of a step's micro-batches: one after another, or through the stages of a pipeline."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron_zebra.data.batch import LocalBatch
from megatron_zebra.model.decoder import Loss


class Runner(Protocol):
    """How micro-batches are computed; called by all ranks with equally many of them, of one length."""

    evaluated_at_once: int
    """Micro-batches that ``evaluate`` wants together."""

    def train(self, batches: Sequence[LocalBatch], scale: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Add the gradient of ``scale`` x the sum of losses; each token's loss [T] by micro-batch, None if not here."""

    def evaluate(self, batches: Sequence[LocalBatch]) -> Sequence[torch.Tensor | None]:
        """Each token's loss [T] by micro-batch, None on ranks that do not hold the head."""


class WholeModel:
    """Without a pipeline: every rank holds all layers."""

    evaluated_at_once = 1

    def __init__(
        self, forward: Callable[..., Loss], backward: Callable[[torch.Tensor], object] = torch.Tensor.backward
    ) -> None:
        self.forward, self.backward = forward, backward

    def train(self, batches: Sequence[LocalBatch], scale: torch.Tensor) -> Sequence[torch.Tensor | None]:
        losses = []
        for batch in batches:
            loss = self.forward(*batch.inputs)
            self.backward(loss.sum * scale)
            losses.append(loss.tokens)
        return losses

    def evaluate(self, batches: Sequence[LocalBatch]) -> Sequence[torch.Tensor | None]:
        return [self.forward(*batch.inputs).tokens for batch in batches]
