"""The attention layer: projections, RoPE, and the kernel over this layer's keys."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_zebra.attention.contract import Segments, attention
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import Linear, RMSNorm
from megatron_zebra.model.rope import rotate


class Attention(nn.Module):
    """Causal attention of layer ``layer`` over x [T, hidden_size], documents apart by ``segments``."""

    def __init__(
        self, name: str, arch: Architecture, layer: int, init: Initializer, backend: str, recompute: bool
    ) -> None:
        super().__init__()
        self.head_dim, self.window = arch.head_dim, arch.window(layer)
        self.backend, self.recompute = backend, recompute
        q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = Linear(f"{name}.q_proj", arch.hidden_size, q, init, arch.qkv_bias)
        self.k_proj = Linear(f"{name}.k_proj", arch.hidden_size, kv, init, arch.qkv_bias)
        self.v_proj = Linear(f"{name}.v_proj", arch.hidden_size, kv, init, arch.qkv_bias)
        self.o_proj = Linear(f"{name}.o_proj", q, arch.hidden_size, init)
        self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps, init) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps, init) if arch.qk_norm else None

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._core, q, k, v, rope, segments, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._core(q, k, v, rope, segments)
        return self.o_proj(out.flatten(1))

    def _core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
    ) -> torch.Tensor:
        q, k = rotate(q, *rope), rotate(k, *rope)
        return attention(
            q,
            k,
            v,
            segments,
            window=self.window,
            backend=self.backend,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
