"""Inputs for attention tests, and what flash-attn's and torch's varlen functions do with their arguments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments

S = 457  # prime: a multiple of no block
WINDOWS = [1, 63, 64, 200, S - 1, S + 5, None]
HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1)}  # query heads, key heads

# name: lengths of queries, and of keys where they differ
SEGMENTS: dict[str, tuple[list[int], list[int] | None]] = {
    "one": ([S], None),
    "ragged": ([1, 2, 3, 40, 100, 17, 250, 1, 43], None),
    "short": ([7, 1, 64, 9, 9, 33, 2, 65, 1, 12, 30, 5, 8, 9, 16, 17, 1, 63, 64], None),
    "equal": ([114, 114, 114, 114, 1], None),
    "halo": ([200], [S]),
    "halo by one": ([S - 1], [S]),
    "ragged halo": ([50, 1, 0, 30, 64, 0, 128, 31], [80, 60, 9, 200, 64, 0, 260, 32]),
    "decode": ([1, 1, 1], [S, 1, 70]),
}


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    segments: Segments


def inputs(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Inputs:
    segments = Segments.from_lengths(q_lengths, k_lengths, device)
    generator = torch.Generator().manual_seed(1)

    def make(tokens: int, h: int) -> torch.Tensor:
        return torch.randn(tokens, h, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)

    tokens, keys = segments.total_q, segments.total_k
    q, k, v = make(tokens, heads[0]), make(keys, heads[1]), make(keys, heads[1])
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), make(tokens, heads[0]), segments)


def run(case: Inputs, function: Callable[..., torch.Tensor] = attention, **options: Any) -> list[torch.Tensor]:
    """Output, dq, dk, dv."""
    out = function(case.q, case.k, case.v, case.segments, **options)
    return [out.detach(), *torch.autograd.grad(out, (case.q, case.k, case.v), case.d_out)]


def assert_equal(ours: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, right, strict=True):
        assert a.shape == b.shape, name
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance, f"{name} is off by {error}"


# --- emulators: the documented meaning of the libraries' arguments, written apart from the code under test ------------


def varlen_mask(cu_q: torch.Tensor, cu_k: torch.Tensor, left: int | None, right: int | None) -> torch.Tensor:
    """[Tq, Tk] bool: ``i + Lk - Lq - left <= j <= i + Lk - Lq + right`` in each segment; None is unbounded."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    mask = torch.zeros(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
        for i in range(b - a):
            center = i + (d - c) - (b - a)
            first = 0 if left is None else max(0, center - left)
            last = d - c - 1 if right is None else min(d - c - 1, center + right)
            mask[a + i, c + first : c + last + 1] = True
    return mask


def flash_mask(version: int, arguments: dict[str, Any]) -> torch.Tensor:
    """What flash-attn of that version would let each query see."""
    left, right = arguments["window_size"]
    if version == 4:
        assert -1 not in (left, right), "version 4 takes -1 for a length"
    else:
        left, right = (None if side == -1 else side for side in (left, right))
    if arguments["causal"]:
        right = 0
    return varlen_mask(arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], left, right)


def torch_mask(arguments: dict[str, Any]) -> torch.Tensor:
    """What ``varlen_attn`` would let each query see; it has no argument for causal."""
    left, right = (None if side == -1 else side for side in arguments["window_size"])
    return varlen_mask(arguments["cu_seq_q"], arguments["cu_seq_k"], left, right)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
