"""Bytes that the activations of one micro-batch take, by moment of the step. Pure: no torch.

Follows the code of ``model/`` tensor by tensor; tests/planning/test_activations.py holds it against the running model.
Sizes are per token: h hidden, q = heads x head_dim, kv = kv_heads x head_dim, f MLP width, H heads, V vocabulary;
e = bytes of an element (2 in bf16). A moment is a place in the step where memory can be highest:

    loss       end of the forward: everything kept, and the loss's chunk of logits with the head's fp32 gradient
    mlp        backward of the last block's SwiGLU
    attention  backward of the last block's attention (where the kernel may be run again)
"""

from dataclasses import dataclass

from megatron_zebra.model.architecture import Architecture

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
) -> Activations:
    """Activations of a micro-batch of ``tokens`` (all its rows).

    Args:
        element_bytes: 2 in bf16, 4 in fp32.
        recompute: ``training.recompute``.
        on_cpu: RMSNorm is several kernels there, which keep its input and the normalised input in fp32 (one on CUDA,
            which keeps its input), and adding bf16 to fp32 makes a copy in fp32.
    """
    e, h, f = element_bytes, arch.hidden_size, arch.ffn_hidden_size
    block = _block(arch, e, recompute, on_cpu)
    layers = (h * e if recompute == "full" else block) * arch.num_layers + _rope(arch)
    before_loss = layers + _norm(h, e, on_cpu) + h * e + FP32
    head = arch.vocab_size * h * FP32
    # Of the block that full recomputation makes again, the input was kept; where the norm keeps a copy, that is new.
    again = block - (h * e if not on_cpu or e == FP32 else 0) if recompute == "full" else 0
    # The gradient of the residual stream (h) lives beside what is kept.
    mlp = layers + again + (h + 3 * f) * e
    attention = layers + again - _mlp_kept(arch, e, on_cpu) + h * e
    return Activations(
        kept=before_loss * tokens + head,
        peaks={
            "loss": (before_loss + h * e) * tokens + head + _loss_working(arch, loss_chunk_size, tokens, e, on_cpu),
            "mlp": mlp * tokens,
            "attention": attention * tokens + _attention_working(arch, tokens, e, recompute, on_cpu),
        },
    )


def _norm(width: int, e: int, on_cpu: bool, count: int = 1) -> int:
    """What RMSNorm of ``count`` rows of ``width`` keeps: its input, or in fp32 that and the normalised input."""
    return count * ((2 * width * FP32 if on_cpu else width * e) + FP32)


def _mlp_kept(arch: Architecture, e: int, on_cpu: bool) -> int:
    """Second half of a block: the norm's, normed, gate, up, their product."""
    return _norm(arch.hidden_size, e, on_cpu) + (arch.hidden_size + 3 * arch.ffn_hidden_size) * e


def _block(arch: Architecture, e: int, recompute: str, on_cpu: bool) -> int:
    """What a block keeps for its backward, a token."""
    h, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    qk_norm = _norm(arch.head_dim, e, on_cpu, arch.num_heads + arch.num_kv_heads) if arch.qk_norm else 0
    log_sum = 0 if recompute == "attention" else arch.num_heads * FP32
    attention = _norm(h, e, on_cpu) + qk_norm + (h + 2 * q + 2 * kv) * e + log_sum
    return attention + _mlp_kept(arch, e, on_cpu)


def _rope(arch: Architecture) -> int:
    """cos and sin in fp32, once for all layers of a kind (once for both if they turn alike)."""
    return (1 if arch.rope["global"] == arch.rope["local"] else 2) * arch.head_dim * FP32


def _attention_working(arch: Architecture, tokens: int, e: int, recompute: str, on_cpu: bool) -> int:
    """Bytes of the last block's kernel: gradients of the output, q, k and v, its own space, and what is made again."""
    heads, q, kv = arch.num_heads, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    again = (2 * q + kv) * e + heads * FP32 if recompute == "attention" else 0
    if not on_cpu:
        # flash-attn: dq summed in fp32, a factor a query, and dk, dv of every query head before they are added up.
        own = q * FP32 + heads * FP32 + (2 * q * e if q > kv else 0)
        return tokens * (2 * q * e + 2 * kv * e + own + again)
    sums = tokens * (2 * q * e + 2 * kv * FP32 + again)
    if arch.layer_kinds[-1] == "global":
        return sums + tokens * (q + 2 * kv) * e
    # A window layer's tiles overlap in their keys, and are computed some at a time.
    return sums + min(tokens * (q + 6 * kv) * e, CPU_TILE_BYTES)


def _loss_working(arch: Architecture, chunk_size: int, tokens: int, e: int, on_cpu: bool) -> int:
    """Of a chunk: logits in fp32, the exponentials beside them, and (from the second chunk) the last chunk's logits."""
    logits = min(chunk_size, tokens) * arch.vocab_size
    before = 0 if chunk_size >= tokens else FP32 + (e if e < FP32 else 0)
    exponentials = logits * (2 * FP32 + before)
    if e == FP32:
        return exponentials
    # In bf16 the head's gradient of a chunk is made in bf16, then added to the fp32 sum.
    head = arch.vocab_size * arch.hidden_size
    return max(exponentials, logits * (FP32 + e) + head * (e + (FP32 if on_cpu else 0)))
