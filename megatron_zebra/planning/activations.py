"""Bytes that the activations of one micro-batch take, by moment of the step. Pure: no torch.

Follows the code of ``model/`` tensor by tensor; tests/planning/test_activations.py holds it against the running model.
Sizes are per token: h hidden, q = heads x head_dim, kv = kv_heads x head_dim, f MLP width, H heads, V vocabulary;
e = bytes of an element (2 in bf16). Under tensor parallelism q, kv, f, H and V are a rank's part, and what lies between
layers has 1/tp of the tokens; the inputs of column-parallel layers have all of them. A moment is a place in the step
where memory can be highest:

    loss       end of the forward: everything kept, and the loss's chunk of logits with the head's fp32 gradient
    mlp        backward of the last block's SwiGLU
    attention  backward of the last block's attention (where the kernel may be run again)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_zebra.attention.window import Window, fetched_range
from megatron_zebra.config.sections import Parallel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.context.layout import Order, stretches
from megatron_zebra.parallel.context.plan import tokens_sent
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.planning.parameters import heads_used

FP32 = 4
CPU_TILE_BYTES = 24 << 20


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch.

    ``kept`` is what the forward leaves for backward over all layers; ``peaks`` the whole of the activations (kept
    and working memory together) at each moment.
    """

    kept: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def working(self) -> int:
        """What the highest moment needs beyond ``kept``."""
        return max(self.peak - self.kept, 0)

    @property
    def highest(self) -> str:
        return max(self.peaks, key=lambda name: self.peaks[name])


def activations(
    arch: Architecture,
    tokens: int,
    *,
    element_bytes: int,
    recompute: str,
    loss_chunk_size: int,
    on_cpu: bool,
    parallel: Parallel | None = None,
    layers: Sequence[int] | None = None,
    rows: int = 1,
) -> Activations:
    """Activations of a micro-batch of ``tokens`` (all its rows) on one rank.

    Args:
        element_bytes: 2 in bf16, 4 in fp32.
        recompute: ``training.recompute``.
        on_cpu: RMSNorm is several kernels there, which keep its input and the normalised input in fp32 (one on CUDA,
            which keeps its input), and adding bf16 to fp32 makes a copy in fp32.
        parallel: tp, and how cp fetches keys; None: neither.
        layers: those of a pipeline stage (the last layer's also has the loss); None: all.
        rows: of the micro-batch, each one document.
    """
    parallel, held = parallel or Parallel(), range(arch.num_layers) if layers is None else layers
    rank = _Rank(arch, parallel, element_bytes, recompute, on_cpu, tokens // parallel.cp, rows)
    e, tp, h, f, own = element_bytes, rank.tp, arch.hidden_size, rank.f, rank.tokens
    last = held[-1] == arch.num_layers - 1
    block = rank.block()
    per_layer = rank.block_input() if recompute == "full" else block
    fetched = sum(rank.fetched_kept(arch.window(layer)) for layer in held)
    stack = (per_layer * len(held) + rank.rope()) * own + fetched
    kept = stack
    # Of the block that full recomputation makes again, the input was kept; where the norm keeps a copy, that is new.
    again = block - (rank.block_input() if rank.norm_keeps_input else 0) if recompute == "full" else 0
    # The gradient of the residual stream (h) lives beside what is kept; under tp also gathered.
    residual = h * e // tp + (h * e if tp > 1 else 0)
    peaks = {
        "mlp": stack + (again + residual + 3 * f * e) * own,
        "attention": stack + (again - rank.mlp_kept() + residual) * own + rank.attention_working(held),
    }
    if last:
        kept += (rank.norm(h) // tp + h * e + FP32) * own + rank.vocab * h * FP32
        peaks["loss"] = kept + h * e * own + rank.loss_working(loss_chunk_size)
    return Activations(kept, peaks)


@dataclass(frozen=True)
class _Rank:
    """The sizes of one rank's part, and the formulas over them. ``tokens``: of its part of the sequence."""

    arch: Architecture
    parallel: Parallel
    e: int
    recompute: str
    on_cpu: bool
    tokens: int
    rows: int

    @property
    def tp(self) -> int:
        return self.parallel.tp

    @property
    def heads(self) -> int:
        return heads_used(self.arch, self.tp)[0]

    @property
    def q(self) -> int:
        return self.heads * self.arch.head_dim

    @property
    def kv(self) -> int:
        return heads_used(self.arch, self.tp)[1] * self.arch.head_dim

    @property
    def f(self) -> int:
        return self.arch.ffn_hidden_size // self.tp

    @property
    def vocab(self) -> int:
        sharding = Sharding(self.tp, 0, self.arch.num_kv_heads, self.parallel.vocab_multiple)
        return sharding.box("head.weight", (self.arch.vocab_size, self.arch.hidden_size)).shape[0]

    def norm(self, width: int, count: int = 1) -> int:
        """What RMSNorm of ``count`` rows of ``width`` keeps: its input, or in fp32 that and the normalised input."""
        return count * ((2 * width * FP32 if self.on_cpu else width * self.e) + FP32)

    def mlp_kept(self) -> int:
        """Second half of a block: the norm's, normed, gate, up, their product."""
        h = self.arch.hidden_size
        return self.norm(h) // self.tp + (h + 3 * self.f) * self.e

    def attention_made(self) -> int:
        """First half of a block: the norm's, normed, q, k, v, the output and the kernel's state."""
        h, (heads, kv_heads) = self.arch.hidden_size, heads_used(self.arch, self.tp)
        qk_norm = self.norm(self.arch.head_dim, heads + kv_heads) if self.arch.qk_norm else 0
        return self.norm(h) // self.tp + qk_norm + (h + 2 * self.q + 2 * self.kv) * self.e + heads * FP32

    def block_input(self) -> int:
        """What goes from block to block."""
        return self.arch.hidden_size * self.e // self.tp

    @property
    def norm_keeps_input(self) -> bool:
        """Whether a norm keeps its input as it is, and no copy in fp32."""
        return not self.on_cpu or self.e == FP32

    def block(self) -> int:
        """What a block keeps for its backward, a token, unless all of it is computed again."""
        recomputed = self.recompute == "attention"
        attention = self.block_input() + self.q * self.e if recomputed else self.attention_made()
        return attention + self.mlp_kept()

    def rope(self) -> int:
        """cos and sin in fp32, once for all layers of a kind (once for both if they turn alike)."""
        rope = self.arch.rope
        return (1 if rope["global"] == rope["local"] else 2) * self.arch.head_dim * FP32

    def keys(self, window: Window) -> tuple[int, int]:
        """(keys that the kernel is given, tokens received for them) on the rank that has most; without cp its own, 0."""
        cp, order = self.parallel.cp, self.parallel.cp_order
        keys, received = _keys(cp, order, self.tokens * cp // self.rows, window)
        return self.rows * keys, self.rows * received

    def fetched_kept(self, window: Window) -> int:
        """Of a layer: keys and values that the kernel keeps beyond the rank's own."""
        if self.recompute != "none" or (window is None and not self.parallel.cp_keep_fetched):
            return 0
        return (self.keys(window)[0] - self.tokens) * 2 * self.kv * self.e

    def attention_working(self, held: Sequence[int]) -> int:
        """Of the last block; where keys are fetched, of the kind of layer that needs most."""
        if self.parallel.cp == 1:
            return self._attention_working(self.arch.window(held[-1]))
        return max(self._attention_working(window) for window in {self.arch.window(layer) for layer in held})

    def _attention_working(self, window: Window) -> int:
        """The kernel's: gradients of the output, q, k and v, its own space, and what is made or fetched again."""
        heads, q, kv, e, tokens = self.heads, self.q, self.kv, self.e, self.tokens
        keys, received = self.keys(window)
        groups = self.parallel.cp_head_groups if self.parallel.cp > 1 and window is None else 1
        again = 0
        if self.recompute == "attention":
            # The output that o_proj kept is gone by then; the block's input is still there, where the norm keeps just that.
            again = self.attention_made() - q * e - (self.block_input() if self.norm_keeps_input else 0)
        exchanged = 0
        if self.parallel.cp > 1:
            refetched = keys if self.recompute != "none" or not (window or self.parallel.cp_keep_fetched) else 0
            exchanged = (refetched + tokens + received) * 2 * kv * e // groups
        if not self.on_cpu:
            # flash-attn: dq summed in fp32, a factor a query, and dk, dv of every query head before they are added up.
            own = tokens * (2 * q * e + q * FP32 + heads * FP32 + again)
            return own + keys * (2 * kv * e + (2 * q * e if q > kv else 0)) // groups + exchanged
        sums = tokens * (2 * q * e + again) + keys * 2 * kv * FP32 // groups
        if window is None:
            return sums + tokens * q * e + keys * 2 * kv * e // groups + exchanged
        # A window layer's tiles overlap in their keys, and are computed some at a time.
        return sums + min(tokens * (q + 6 * kv) * e, CPU_TILE_BYTES) + exchanged

    def loss_working(self, chunk_size: int) -> int:
        """Of a chunk: logits in fp32, the exponentials beside them, and (from the second chunk) the last chunk's logits."""
        e, logits = self.e, min(chunk_size, self.tokens) * self.vocab
        before = 0 if chunk_size >= self.tokens else FP32 + (e if e < FP32 else 0)
        exponentials = logits * (2 * FP32 + before)
        if e == FP32:
            return exponentials
        # In bf16 the head's gradient of a chunk is made in bf16, then added to the fp32 sum.
        head = self.vocab * self.arch.hidden_size
        return max(exponentials, logits * (FP32 + e) + head * (e + (FP32 if self.on_cpu else 0)))


@lru_cache(maxsize=256)
def _keys(cp: int, order: Order, length: int, window: Window) -> tuple[int, int]:
    """See ``_Rank.keys``, of one row of ``length`` tokens, one document."""
    if cp == 1:
        return length, 0
    given = [
        sum(stop - fetched_range(start, 0, window)[0] for start, stop in stretches(rank, cp, 1, length, order).tolist())
        for rank in range(cp)
    ]
    sent = tokens_sent(np.array([0, length]), 1, length, cp, order, window)
    return max(given), int(sent.sum(axis=0).max())
