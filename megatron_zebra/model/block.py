"""One decoder layer."""

import torch
from torch import nn

from megatron_zebra.attention.contract import Segments
from megatron_zebra.attention.keys import KeptKeys
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.attention import Attention
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import RMSNorm
from megatron_zebra.model.mlp import MLP
from megatron_zebra.parallel.context.shard import ContextShard


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [T / tp, hidden_size]."""

    def __init__(
        self, arch: Architecture, layer: int, init: Initializer, backend: str, recompute_attention: bool
    ) -> None:
        super().__init__()
        name = f"layers.{layer}"
        self.attention_norm = RMSNorm(f"{name}.attention_norm", arch.hidden_size, arch.norm_eps, init)
        self.attention = Attention(f"{name}.attention", arch, layer, init, backend, recompute_attention)
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", arch.hidden_size, arch.norm_eps, init)
        self.mlp = MLP(f"{name}.mlp", arch, init)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments | ContextShard | KeptKeys
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, segments)
        return x + self.mlp(self.mlp_norm(x))
