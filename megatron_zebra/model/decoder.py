"""The whole model: embedding, layers by global number, norm, and a head that gives the loss or the logits."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_zebra.attention.contract import Segments
from megatron_zebra.attention.registry import check_backend, resolve_backend
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.block import Block
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import Embedding, RMSNorm
from megatron_zebra.model.loss import token_loss
from megatron_zebra.model.pattern import LayerKind
from megatron_zebra.model.rope import inverse_frequencies, phases


class Loss(NamedTuple):
    """``sum`` over valid targets (differentiable), ``tokens`` [T] of each (detached, 0 where there is no target)."""

    sum: torch.Tensor
    tokens: torch.Tensor


class Head(nn.Module):
    """Reads its weight inside forward, where ZeRO-3 has it gathered."""

    def __init__(self, weight: nn.Parameter, loss_chunk_size: int) -> None:
        super().__init__()
        self.weight = weight
        self.loss_chunk_size = loss_chunk_size

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | Loss:
        if labels is None:
            return nn.functional.linear(x, self.weight)
        return Loss(*token_loss(x, self.weight, labels, self.loss_chunk_size))


class Decoder(nn.Module):
    """Tokens [T] of one micro-batch, its rows end to end, to a Loss (with labels [T]) or logits [T, vocab_size]."""

    def __init__(
        self,
        arch: Architecture,
        init: Initializer,
        *,
        backend: str = "auto",
        recompute: str = "none",
        loss_chunk_size: int = 1024,
    ) -> None:
        super().__init__()
        backend = resolve_backend(backend, init.device.type, init.dtype)
        self.recompute_block = recompute == "full"
        # Plain tensors, not buffers: a cast of the module to bf16 must not round them.
        self.rope: dict[LayerKind, tuple[torch.Tensor, float]] = {}
        for kind, rope in arch.rope.items():
            frequencies, factor = inverse_frequencies(rope, arch.head_dim)
            self.rope[kind] = (frequencies.to(init.device), factor)
        self.same_rope = arch.rope["global"] == arch.rope["local"]
        self.embedding = Embedding("embedding", arch.vocab_size, arch.hidden_size, init)
        self.layers = nn.ModuleDict()  # by global layer number
        self.kinds = arch.layer_kinds
        for i in range(arch.num_layers):
            check_backend(
                backend,
                device_type=init.device.type,
                dtype=init.dtype,
                head_dim=arch.head_dim,
                num_heads=arch.num_heads,
                num_kv_heads=arch.num_kv_heads,
                window=arch.window(i),
                layer=f"layer {i} ({arch.layer_kinds[i]})",
            )
            self.layers[str(i)] = Block(arch, i, init, backend, recompute == "attention")
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps, init)
        weight = (
            self.embedding.weight
            if arch.tie_embeddings
            else init.normal("head.weight", arch.vocab_size, arch.hidden_size)
        )
        self.head = Head(weight, loss_chunk_size)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, segments: Segments, labels: torch.Tensor | None = None
    ) -> torch.Tensor | Loss:
        rope = self._phases(positions)
        x = self.embedding(tokens)
        for number, layer in self.layers.items():
            phase = rope[self.kinds[int(number)]]
            if self.recompute_block and torch.is_grad_enabled():
                x = checkpoint(layer, x, phase, segments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, phase, segments)
        return self.head(self.norm(x), labels)

    def _phases(self, positions: torch.Tensor) -> dict[LayerKind, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of both kinds of layer, made once for all layers."""
        made: dict[LayerKind, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind, (frequencies, factor) in self.rope.items():
            if kind == "local" and self.same_rope:
                made[kind] = made["global"]
            else:
                made[kind] = phases(positions, frequencies, factor)
        return made
