"""A pipeline of stages on the ranks of ``pp``, run by torch's schedules.

Only hidden states travel between ranks: each rank reads its own micro-batches' tokens, positions and boundaries, and a
stage looks them up by the number of the micro-batch, which the schedule hands it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from megatron_zebra.data.batch import LocalBatch
from megatron_zebra.model.decoder import Decoder, Loss
from megatron_zebra.parallel.grid import Grid

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
}


class Pipeline:
    """Runs micro-batches through all stages; this rank holds those of ``held``, by number of the stage.

    ``collect`` is called after each half of a backward (zero_bubble) that added to weights' gradients past their hooks.

    Raises:
        ValueError: the schedule cannot do with so many micro-batches.
    """

    def __init__(
        self,
        held: dict[int, Decoder],
        num_stages: int,
        schedule: str,
        grid: Grid,
        hidden_size: int,
        dtype: torch.dtype,
        collect: Callable[[], None],
    ) -> None:
        self.num_stages, self.schedule, self.grid = num_stages, schedule, grid
        self.hidden_size, self.dtype, self.collect = hidden_size, dtype, collect
        self.parts = {number: _Part(decoder, grid) for number, decoder in held.items()}
        self.evaluated_at_once = grid.pp.size if schedule != "zero_bubble" else 2 * grid.pp.size
        self._made: tuple[tuple[int, int, bool], Any] | None = None

    def train(self, batches: Sequence[LocalBatch], scale: torch.Tensor) -> Sequence[Loss | None]:
        """See Runner."""
        return self._run(batches, scale)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[LocalBatch]) -> Sequence[torch.Tensor | None]:
        """See Runner."""
        return [loss and loss.tokens for loss in self._run(batches, None)]

    def _run(self, batches: Sequence[LocalBatch], scale: torch.Tensor | None) -> Sequence[Loss | None]:
        losses: list[Loss | None] = [None] * len(batches)
        for part in self.parts.values():
            part.batches, part.losses, part.training = batches, losses, scale is not None
        schedule = self._schedule(len(batches), len(batches[0].tokens), scale is not None)
        numbers = torch.arange(len(batches))
        inputs = (numbers,) if 0 in self.parts else ()
        factor = 1.0 if scale is None else scale
        schedule._loss_fn = lambda loss_sum, _: loss_sum.sum() * factor
        target = numbers if self.num_stages - 1 in self.parts else None
        run = schedule.eval if scale is None else schedule.step
        failure = None
        with self.grid.traffic.within(f"pipeline over {self.grid.pp}", waits=False), _quiet_schedule():
            try:
                run(*inputs, number=numbers, target=target, return_outputs=False)
            except RuntimeError as page:  # torch's, about the arguments of the stage in which something was raised
                failure = page.__cause__ or page
            if failure is not None:
                raise failure
        return losses

    def _schedule(self, count: int, tokens: int, training: bool) -> Any:
        """The schedule for ``count`` micro-batches of ``tokens``: shapes are fixed for as long as these do not change."""
        key = (count, tokens, training)
        if self._made is None or self._made[0] != key:
            stages = [self._stage(number, part, tokens) for number, part in self.parts.items()]
            kind = SCHEDULES[self.schedule]
            made = kind(stages[0] if kind is Schedule1F1B else stages, count, loss_fn=_no_loss_yet, scale_grads=False)
            self._made = key, made
        return self._made[1]

    def _stage(self, number: int, part: "_Part", tokens: int) -> PipelineStage:
        hidden = torch.empty(tokens // self.grid.tp.size, self.hidden_size, dtype=self.dtype, device=self.grid.device)
        first, last = number == 0, number == self.num_stages - 1
        stage = _Stage(
            part,
            number,
            self.num_stages,
            self.grid.device,
            input_args=torch.arange(1) if first else hidden.requires_grad_(),
            output_args=torch.empty(1, device=self.grid.device).requires_grad_() if last else hidden.requires_grad_(),
            group=self.grid.pp.handle,
        )
        stage.collect = self.collect
        return stage


@contextmanager
def _quiet_schedule() -> Iterator[None]:
    """Without torch's log of its whole schedule when a step fails, in which the line that matters is lost."""
    log = logging.getLogger("torch.distributed.pipelining.schedules")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class _Stage(PipelineStage):
    """torch's stage, which adds the weights' gradients of a split backward to ``.grad`` by itself."""

    collect: Callable[[], None]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        self.collect()

    # In an evaluation nothing comes back; torch's two neighbours on one rank do not know that.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class _Part(nn.Module):
    """A stage as torch's schedules call it; the last one gives its micro-batch's sum of losses [1]."""

    def __init__(self, decoder: Decoder, grid: Grid) -> None:
        super().__init__()
        self.decoder, self.pp = decoder, grid.pp
        self.batches: Sequence[LocalBatch] = ()
        self.losses: list[Loss | None] = []

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        i = int(number)  # on the host: waits for no device
        first = self.decoder.embedding is not None
        out = self.decoder(*self.batches[i].inputs, hidden=None if first else x)
        if not first:
            self._count(x)
        if isinstance(out, Loss):
            self.losses[i] = out._replace(sum=out.sum.detach())
            return out.sum.view(1)
        if self.training:
            self._count(out)  # as many bytes come back as its gradient
        return out

    def _count(self, hidden: torch.Tensor) -> None:
        self.pp.count(hidden.numel() * hidden.element_size())


def _no_loss_yet(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("set before every step")
