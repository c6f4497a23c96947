"""The attention layer: projections, RoPE, and the kernel over this layer's keys."""

import torch
from torch import nn

from megatron_zebra.attention.attending import Attending
from megatron_zebra.attention.contract import Segments
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import KVLinear, Linear, RMSNorm
from megatron_zebra.model.rope import rotate
from megatron_zebra.parallel.context.attend import attend
from megatron_zebra.parallel.context.shard import ContextShard
from megatron_zebra.parallel.tensor import gather_sequence, scatter_sum


class Attention(nn.Module):
    """Causal attention of layer ``layer`` over x [T / tp, hidden_size], documents apart by ``segments``.

    Each tensor-parallel rank computes its own ``heads`` over all T tokens; ``project`` brings them together. The two are
    apart because the first may be computed again in backward.
    """

    def __init__(self, name: str, arch: Architecture, layer: int, init: Initializer, backend: str) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim, self.window, self.rotated = arch.head_dim, arch.window(layer), layer not in arch.nope_layers
        self.backend, self.tp = backend, init.tp
        hidden, heads, kv_heads, dim = arch.hidden_size, arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.q_proj = Linear(f"{name}.q_proj", hidden, heads * dim, init, arch.qkv_bias)
        self.k_proj = KVLinear(f"{name}.k_proj", hidden, kv_heads, dim, init, arch.qkv_bias)
        self.v_proj = KVLinear(f"{name}.v_proj", hidden, kv_heads, dim, init, arch.qkv_bias)
        self.o_proj = Linear(f"{name}.o_proj", heads * dim, hidden, init)
        self.q_norm = RMSNorm(f"{name}.q_norm", dim, arch.norm_eps, init) if arch.qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", dim, arch.norm_eps, init) if arch.qk_norm else None

    def heads(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments | ContextShard | Attending
    ) -> torch.Tensor:
        """What this rank's heads give: [T, heads, head_dim]."""
        x = gather_sequence(x, self.tp)
        q, k, v = (proj(x).view(x.shape[0], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if not isinstance(segments, Segments | ContextShard):
            return segments.attend(self.layer, q, k, v, window=self.window, backend=self.backend)
        deterministic = torch.are_deterministic_algorithms_enabled()
        return attend(q, k, v, segments, window=self.window, backend=self.backend, deterministic=deterministic)

    def project(self, heads: torch.Tensor) -> torch.Tensor:
        """All heads' outputs into the residual stream: [T / tp, hidden_size]."""
        return scatter_sum(self.o_proj(heads.flatten(1)), self.tp)
