"""The model, or the part of it that a pipeline stage holds: embedding, layers by global number, norm, head."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_zebra.attention.attending import Attending
from megatron_zebra.attention.contract import Segments
from megatron_zebra.attention.registry import check_backend, resolve_backend
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.block import Block
from megatron_zebra.model.distill import Guide
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.layers import Embedding, RMSNorm
from megatron_zebra.model.loss import token_loss
from megatron_zebra.model.offload import on_host
from megatron_zebra.model.pattern import LayerKind
from megatron_zebra.model.recompute import computed_again
from megatron_zebra.model.rope import inverse_frequencies, phases
from megatron_zebra.parallel.context.shard import ContextShard
from megatron_zebra.parallel.tensor import gather_sequence


class Loss(NamedTuple):
    """``sum`` over valid targets (differentiable), ``tokens`` [T] of each (detached, 0 where there is no target).

    With a teacher ``sum`` is of the mixture, ``tokens`` is the cross entropy alone and ``apart`` [T] the divergence.
    """

    sum: torch.Tensor
    tokens: torch.Tensor
    apart: torch.Tensor | None = None


class Head(nn.Module):
    """x [T / tp, hidden_size] to a Loss or logits. Reads its weight inside forward, where ZeRO-3 has it gathered."""

    def __init__(
        self, weight: nn.Parameter, arch: Architecture, init: Initializer, loss_chunk_size: int, split_backward: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self.box = init.sharding.box("head.weight", (arch.vocab_size, arch.hidden_size))
        self.vocab_size, self.tp = arch.vocab_size, init.tp
        self.loss_chunk_size, self.split_backward = loss_chunk_size, split_backward

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None, guide: Guide | None = None) -> torch.Tensor | Loss:
        x = gather_sequence(x, self.tp)
        if labels is None:
            return self.logits(x)
        weight = self.weight[: self.box.shape[0]]  # without the padding, which so can neither win nor count
        first = self.box.offsets[0]
        return Loss(*token_loss(x, weight, labels, self.loss_chunk_size, first, self.tp, self.split_backward, guide))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Of any tokens, whole on every rank: x [n, hidden_size] -> [n, vocab_size]."""
        logits = nn.functional.linear(x, self.weight)
        return self.tp.all_gather(logits.t()).t()[:, : self.vocab_size]


class Decoder(nn.Module):
    """Tokens [T] of one micro-batch, its rows end to end, to a Loss (with labels [T]) or logits [T, vocab_size].

    A pipeline stage holds ``layers`` (all by default), the first one the embedding too, the last one the head. A stage
    that is not the first takes ``hidden`` [T / tp, hidden_size] of the stage before; one that is not the last returns it.
    ``split_backward``: see ``model.loss``.
    ``tied`` is the embedding's weight, where another stage of this rank holds it and the head uses it too.
    """

    def __init__(
        self,
        arch: Architecture,
        init: Initializer,
        *,
        layers: range | None = None,
        backend: str = "auto",
        recompute: str = "none",
        offload: bool = False,
        loss_chunk_size: int = 1024,
        split_backward: bool = False,
        tied: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        held = range(arch.num_layers) if layers is None else layers
        backend = resolve_backend(backend, init.device.type, init.dtype)
        self.recompute_block, self.offload = recompute == "full", offload
        # Plain tensors, not buffers: a cast of the module to bf16 must not round them.
        self.rope: dict[LayerKind, tuple[torch.Tensor, float]] = {}
        for kind, rope in arch.rope.items():
            frequencies, factor = inverse_frequencies(rope, arch.head_dim)
            self.rope[kind] = (frequencies.to(init.device), factor)
        self.same_rope = arch.rope["global"] == arch.rope["local"]
        self.embedding = Embedding("embedding", arch.vocab_size, arch.hidden_size, init) if held.start == 0 else None
        self.layers = nn.ModuleDict()  # by global layer number
        self.kinds = arch.layer_kinds
        for i in held:
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
            self.layers[str(i)] = Block(arch, i, init, backend, recompute == "attention", offload)
        self.norm: RMSNorm | None = None
        self.head: Head | None = None
        if held.stop == arch.num_layers:
            self.norm = RMSNorm("norm", arch.hidden_size, arch.norm_eps, init)
            self.head = Head(self._head_weight(arch, init, tied), arch, init, loss_chunk_size, split_backward)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: Segments | ContextShard,
        labels: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        guide: Guide | None = None,
    ) -> torch.Tensor | Loss:
        x = self.states(tokens, positions, segments, hidden)
        return x if self.head is None else self.head(x, labels, guide)

    @torch.no_grad()
    def guide(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: Segments | ContextShard,
        share: float,
        temperature: float,
    ) -> Guide:
        """What the model predicts for ``tokens``, for another one to learn from."""
        assert self.head is not None
        x = gather_sequence(self.states(tokens, positions, segments), self.head.tp)
        return Guide(x, self.head.weight[: self.head.box.shape[0]], share, temperature)

    def states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        segments: Segments | ContextShard | Attending,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What goes into the head, or where another stage has it, into the next stage: [T / tp, hidden_size]."""
        rope = self._phases(positions)
        x: Any = self.embedding(tokens) if self.embedding is not None else hidden
        for number, layer in self.layers.items():
            phase = rope[self.kinds[int(number)]]
            x = self._block(layer, x, phase, segments)
        return x if self.norm is None else self.norm(x)

    def _block(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        phase: tuple[torch.Tensor, torch.Tensor],
        segments: Segments | ContextShard | Attending,
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return layer(x, phase, segments)
        if not self.recompute_block:
            with on_host(layer) if self.offload else nullcontext():
                return layer(x, phase, segments)
        return computed_again(lambda x: layer(x, phase, segments), x, self.offload)

    def _head_weight(self, arch: Architecture, init: Initializer, tied: nn.Parameter | None) -> nn.Parameter:
        """A tied head shares the embedding's parameter; where that is on another rank, it holds a copy of it."""
        if not arch.tie_embeddings:
            return init.normal("head.weight", arch.vocab_size, arch.hidden_size)
        if tied is not None:
            return tied
        if self.embedding is not None:
            return self.embedding.weight
        copy: Any = init.normal("embedding.weight", arch.vocab_size, arch.hidden_size)
        copy.ds_pipe_replicated = True  # counted once in the gradient's norm
        return copy

    def _phases(self, positions: torch.Tensor) -> dict[LayerKind, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin of both kinds of layer, made once for all layers."""
        made: dict[LayerKind, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind, (frequencies, factor) in self.rope.items():
            if kind == "local" and self.same_rope:
                made[kind] = made["global"]
            else:
                made[kind] = phases(positions, frequencies, factor)
        return made
