"""Forward and backward of a step's micro-batches: one after another, or through the stages of a pipeline."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron_zebra.data.batch import LocalBatch
from megatron_zebra.model.decoder import Loss
from megatron_zebra.model.distill import Guide


class Runner(Protocol):
    """How micro-batches are computed; called by all ranks with equally many of them, of one length."""

    evaluated_at_once: int
    """Micro-batches that ``evaluate`` wants together."""

    def train(self, batches: Sequence[LocalBatch], scale: torch.Tensor) -> Sequence[Loss | None]:
        """Add the gradient of ``scale`` x the sum of losses; the (detached) loss by micro-batch, None if not here."""

    def evaluate(self, batches: Sequence[LocalBatch]) -> Sequence[torch.Tensor | None]:
        """Each token's loss [T] by micro-batch, None on ranks that do not hold the head."""


class WholeModel:
    """Without a pipeline: every rank holds all layers."""

    evaluated_at_once = 1

    def __init__(
        self,
        forward: Callable[..., Loss],
        backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
        teacher: Callable[[LocalBatch], Guide] | None = None,
    ) -> None:
        self.forward, self.backward, self.teacher = forward, backward, teacher

    def train(self, batches: Sequence[LocalBatch], scale: torch.Tensor) -> Sequence[Loss | None]:
        losses = []
        for batch in batches:
            taught = (None, self.teacher(batch)) if self.teacher else ()
            loss = self.forward(*batch.inputs, *taught)
            self.backward(loss.sum * scale)
            losses.append(loss._replace(sum=loss.sum.detach()))
        return losses

    def evaluate(self, batches: Sequence[LocalBatch]) -> Sequence[torch.Tensor | None]:
        return [self.forward(*batch.inputs).tokens for batch in batches]
