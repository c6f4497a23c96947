"""What training asks of an optimizer, however its state is divided over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.sharding import Box

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Adam:
    """AdamW's settings; the learning rate comes with each step."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_grad: float


class Held(NamedTuple):
    """The part of one parameter's state that this rank holds: elements [start, start + numel) of its flattened ``box``.

    ``holder`` is this rank's number among those that hold the same, and how many these are; (0, 0) marks a copy of what
    another pipeline stage owns.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    start: int
    numel: int
    holder: tuple[int, int]
    tensors: dict[str, torch.Tensor]
    """By kind (weight, exp_avg, exp_avg_sq): fp32 [numel] views of the optimizer's own memory, to read or to write.

    Of a parameter that is not trained the weight alone, in the precision trained in.
    """


class StepResult(NamedTuple):
    """``norm`` of the whole gradient before clipping (inf or nan if not finite) and whether the weights moved."""

    norm: float
    applied: bool


class ShardedOptimizer(Protocol):
    """Forward, backward and step of one model; gradients are averaged over the ranks of ``grid.data``."""

    module: torch.nn.Module

    def forward(self, *args: Any) -> Any: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def collect(self) -> None:
        """Take in gradients that came past autograd's hooks, as a backward that is split in two leaves them."""

    def step(self, learning_rate: float, update: bool = True) -> StepResult:
        """Reduce, clip, update. A gradient that is not finite on any rank leaves every rank's weights and moments as they are.

        Args:
            update: False leaves them as they are in any case; the same on all ranks.
        """

    def held(self) -> Iterator[Held]: ...

    def updates(self) -> int:
        """Steps that were applied: AdamW's own count."""

    def restored(self, updates: int) -> None:
        """Take over what was written into ``held()``: copy the masters to the weights, set AdamW's count."""


def held_part(
    param: Any, start: int, numel: int, tensors: dict[str, torch.Tensor], grid: Grid, replicated: bool
) -> Held:
    """What this rank holds of ``param``, without the padding of the vocabulary (its last rows).

    Args:
        start, numel: the interval of the flattened parameter that ``tensors`` [numel] are.
        replicated: whether all ranks of ``grid.data`` hold the same interval.
    """
    box = param.box
    numel = max(0, min(start + numel, prod(box.shape)) - start)
    number, count = (grid.data.rank, grid.data.size) if replicated else (0, 1)
    if not param.tensor_model_parallel:
        number, count = number * grid.tp.size + grid.tp.rank, count * grid.tp.size
    if getattr(param, "ds_pipe_replicated", False):
        number, count = 0, 0
    parts = {kind: tensor.detach().view(-1)[:numel] for kind, tensor in tensors.items()}
    return Held(param.full_name, param.full_shape, box, start, numel, (number, count), parts)


def held_frozen(module: torch.nn.Module, grid: Grid) -> Iterator[Held]:
    """The parameters that are not trained, whole on all ranks of ``grid.data``."""
    for param in module.parameters():
        if not param.requires_grad:
            yield held_part(param, 0, param.numel(), {"weight": param}, grid, replicated=True)


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases (one dimension) without."""
    matrices = [p for p in module.parameters() if p.requires_grad and _dimensions(p) > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and _dimensions(p) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], adam: Adam) -> torch.optim.AdamW:
    """torch's AdamW over ``groups``."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=True)


def create_moments(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> None:
    """Give ``params`` AdamW's empty state now, so that it can be saved and loaded before the first step."""
    for param in params:
        if not optimizer.state[param]:
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                **{kind: torch.zeros_like(param) for kind in MOMENTS},
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set AdamW's count of every parameter."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def get_updates(optimizer: torch.optim.Optimizer) -> int:
    """AdamW's count (0 where this rank holds nothing)."""
    return max((int(state["step"].item()) for state in optimizer.state.values()), default=0)


def _dimensions(param: torch.nn.Parameter) -> int:
    return len(getattr(param, "ds_shape", param.shape))
