"""SwiGLU."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import Linear
from megatron_zebra.parallel.tensor import gather_sequence, scatter_sum


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its two inputs for backward (plain autograd keeps silu(gate) too)."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x [T / tp, hidden_size]."""

    def __init__(self, name: str, arch: Architecture, init: Initializer) -> None:
        super().__init__()
        hidden, width = arch.hidden_size, arch.ffn_hidden_size
        self.gate_proj = Linear(f"{name}.gate_proj", hidden, width, init)
        self.up_proj = Linear(f"{name}.up_proj", hidden, width, init)
        self.down_proj = Linear(f"{name}.down_proj", width, hidden, init)
        self.tp = init.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = gather_sequence(x, self.tp)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return scatter_sum(self.down_proj(_swiglu(gate, up)), self.tp)
