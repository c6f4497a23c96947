"""Tensor and sequence parallelism: what lies between layers is split over the sequence, what is inside them over heads.

Each function is the identity over a group of one. Tokens are dimension 0.
"""

from typing import Any

import torch

from megatron_zebra.parallel.group import Group


def gather_sequence(x: torch.Tensor, tp: Group) -> torch.Tensor:
    """[T / tp, ...] of each rank to all [T, ...], before a column-parallel layer; backward sums and splits again."""
    return _Gather.apply(x, tp) if tp.size > 1 else x


def scatter_sum(x: torch.Tensor, tp: Group) -> torch.Tensor:
    """Partial sums [T, ...] to this rank's [T / tp, ...] of their sum, after a row-parallel layer; backward gathers."""
    return _ScatterSum.apply(x, tp) if tp.size > 1 else x


def sum_gradient(weight: torch.Tensor, tp: Group) -> torch.Tensor:
    """A weight that is whole on every rank but used on a part of the tokens or heads: backward sums its gradient.

    It must be summed here, within backward: afterwards is too late for ZeRO 2 and 3.
    """
    return _SumGradient.apply(weight, tp) if tp.size > 1 else weight


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Group) -> torch.Tensor:
        ctx.tp = tp
        return tp.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.tp.reduce_scatter(grad), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: Group) -> torch.Tensor:
        ctx.tp = tp
        return tp.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.tp.all_gather(grad), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, tp: Group) -> torch.Tensor:
        ctx.tp = tp
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.tp.all_reduce(grad.contiguous().clone()), None
