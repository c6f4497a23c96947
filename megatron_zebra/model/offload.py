"""Activations kept for backward in host memory."""

from contextlib import AbstractContextManager

import torch
from torch import nn


def on_host(module: nn.Module) -> AbstractContextManager[object]:
    """Within it, what autograd saves for backward goes to host memory, and comes back when it is used.

    Not the weights of ``module``, which stay where they are anyway. On a CPU nothing moves.
    """
    weights = {param.untyped_storage().data_ptr() for param in module.parameters()}

    def pack(x: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        if x.device.type == "cpu" or x.untyped_storage().data_ptr() in weights:
            return x.device, x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return x.device, host.copy_(x, non_blocking=True)

    def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, x = packed
        return x.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
