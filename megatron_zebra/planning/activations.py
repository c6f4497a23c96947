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
    fused_norm: bool,
) -> Activations:
    """Activations of a micro-batch of ``tokens`` (all its rows).

    Args:
        element_bytes: 2 in bf16, 4 in fp32.
        recompute: ``training.recompute``.
        fused_norm: RMSNorm is one kernel that keeps its input and a factor a token (CUDA); otherwise torch keeps
            the normalised input too.
    """
    e, h, f = element_bytes, arch.hidden_size, arch.ffn_hidden_size
    rope = _rope(arch)
    block = _block(arch, e, recompute, fused_norm)
    layers = (h * e if recompute == "full" else block) * arch.num_layers + rope
    final = 2 * h * e + _norm_extra(arch.hidden_size, e, fused_norm)
    chunk = min(loss_chunk_size, tokens)
    logits, head = _loss_chunk(arch, chunk, tokens, e), arch.vocab_size * h * FP32
    kept = (layers + final + FP32) * tokens + head
    # Below, the residual stream's gradient (h) lives beside what is kept, and `layers` is whole but for the last block.
    rebuilt = (block - h * e) if recompute == "full" else 0
    mlp = layers + rebuilt + (h + 3 * f) * e
    attention = layers + rebuilt - _mlp_kept(arch, e, fused_norm) + h * e + _attention_working(arch, e, recompute)
    return Activations(
        kept,
        {
            "loss": (layers + final + h * e + FP32) * tokens + head + logits,
            "mlp": mlp * tokens,
            "attention": attention * tokens,
        },
    )


def _norm_extra(width: int, e: int, fused: bool, count: int = 1) -> int:
    """What RMSNorm of ``count`` rows of ``width`` keeps beside its input."""
    return count * (FP32 if fused else width * e + e)


def _mlp_kept(arch: Architecture, e: int, fused_norm: bool) -> int:
    """Second half of a block: norm input, normed, gate, up, their product."""
    h, f = arch.hidden_size, arch.ffn_hidden_size
    return 2 * h * e + _norm_extra(h, e, fused_norm) + 3 * f * e


def _block(arch: Architecture, e: int, recompute: str, fused_norm: bool) -> int:
    """What a block keeps for its backward, a token."""
    h, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    norms = 0
    if arch.qk_norm:
        # QK-norm keeps q and k as projected, unless recomputation keeps nothing else of them.
        heads = arch.num_heads + arch.num_kv_heads
        norms = (q + kv) * e + _norm_extra(arch.head_dim, e, fused_norm, heads)
    log_sum = 0 if recompute == "attention" else arch.num_heads * FP32
    attention = 2 * h * e + _norm_extra(h, e, fused_norm) + norms + (2 * q + 2 * kv) * e + log_sum
    return attention + _mlp_kept(arch, e, fused_norm)


def _rope(arch: Architecture) -> int:
    """cos and sin in fp32, once for all layers of a kind (once for both if they turn alike)."""
    return (1 if arch.rope["global"] == arch.rope["local"] else 2) * arch.head_dim * FP32


def _attention_working(arch: Architecture, e: int, recompute: str) -> int:
    """Gradients of the output, q, k and v (k's and v's summed in fp32), and what recomputation makes again."""
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    again = (2 * q + kv) * e + arch.num_heads * FP32 if recompute == "attention" else 0
    return 2 * q * e + 2 * kv * FP32 + again


def _loss_chunk(arch: Architecture, chunk: int, tokens: int, e: int) -> int:
    """Logits of a chunk in fp32, the exponentials beside them, and (from the second chunk) the last chunk's."""
    before = 0 if chunk >= tokens else FP32 + (e if e < FP32 else 0)
    return chunk * arch.vocab_size * (2 * FP32 + before)
