"""One decoder layer."""

import torch
from torch import nn

from megatron_zebra.attention.attending import Attending
from megatron_zebra.attention.contract import Segments
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.attention import Attention
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import RMSNorm
from megatron_zebra.model.mlp import MLP
from megatron_zebra.model.recompute import computed_again
from megatron_zebra.parallel.context.shard import ContextShard


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [T / tp, hidden_size].

    ``recompute_attention``: of the first half only x and the heads' outputs are kept for backward, the norm, q, k, v and
    the kernel's state are computed again; with ``offload`` that x is kept in host memory.
    """

    def __init__(
        self, arch: Architecture, layer: int, init: Initializer, backend: str, recompute_attention: bool, offload: bool
    ) -> None:
        super().__init__()
        name = f"layers.{layer}"
        self.recompute_attention, self.offload = recompute_attention, offload
        self.attention_norm = RMSNorm(f"{name}.attention_norm", arch.hidden_size, arch.norm_eps, init)
        self.attention = Attention(f"{name}.attention", arch, layer, init, backend)
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", arch.hidden_size, arch.norm_eps, init)
        self.mlp = MLP(f"{name}.mlp", arch, init)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments | ContextShard | Attending
    ) -> torch.Tensor:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return self.attention.heads(self.attention_norm(x), rope, segments)

        again = self.recompute_attention and torch.is_grad_enabled()
        x = x + self.attention.project(computed_again(heads, x, self.offload) if again else heads(x))
        return x + self.mlp(self.mlp_norm(x))
