"""Weights that several ranks hold alike must be alike to the bit; a fault of a device's memory is found by comparing them."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group


def differing(module: nn.Module, grid: Grid) -> str | None:
    """The first weight that a rank holds other than the ranks that should hold the same, in words; called by all ranks.

    Compared are the sums of all bits, as whole numbers: over ``grid.data`` (under ZeRO-3, where each holds its own part,
    nothing) and, of what tensor parallelism does not divide, over ``grid.tp``. No rank sends more than a number a weight.
    """
    params = list(module.named_parameters())
    whole = [(name, param) for name, param in params if not hasattr(param, "ds_tensor")]
    alike = [(name, param) for name, param in params if not getattr(param, "tensor_model_parallel", False)]
    found = [_compare(whole, grid.data), _compare(alike, grid.tp)]  # both, as the others do
    return next(filter(None, found), None)


def _compare(params: Sequence[tuple[str, nn.Parameter]], group: Group) -> str | None:
    if group.size == 1 or not params:
        return None
    own = torch.stack([_bits(getattr(param, "ds_tensor", param).detach()) for _, param in params])
    sums = group.all_gather(own[None])
    same = (sums == sums[0]).all(0)
    if bool(same.all()):
        return None
    which = int((~same).nonzero()[0])
    found = sums[:, which].tolist()
    usual = Counter(found).most_common(1)[0][0]
    odd = [str(rank) for rank, value in zip(group.ranks, found) if value != usual]
    others = [str(rank) for rank, value in zip(group.ranks, found) if value == usual]
    name = getattr(params[which][1], "full_name", params[which][0])
    return f"{name} on rank {', '.join(odd)} is not what rank {', '.join(others)} has"


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Sum of the elements' bits as whole numbers: one turned bit always changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(whole).sum(dtype=torch.int64)
