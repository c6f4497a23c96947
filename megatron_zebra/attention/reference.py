"""Attention by a dense mask, in as few lines as possible: the oracle of the tests. Memory O(Tq · Tk)."""

import torch

from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window


def dense_mask(segments: Segments, window: Window) -> torch.Tensor:
    """[Tq, Tk] bool on the segments' device: True where the query sees the key."""
    device = segments.cu_q_device.device
    q_lengths, k_lengths = torch.from_numpy(segments.q_lengths), torch.from_numpy(segments.k_lengths)
    segment = torch.arange(len(q_lengths))
    q_segment, k_segment = segment.repeat_interleave(q_lengths), segment.repeat_interleave(k_lengths)
    # Rows of the packed keys: the segment's last query stands at its last key.
    q_row = torch.arange(segments.total_q) + (torch.from_numpy(segments.cu_k[1:] - segments.cu_q[1:]))[q_segment]
    k_row = torch.arange(segments.total_k)
    distance = q_row[:, None] - k_row[None]
    mask = (q_segment[:, None] == k_segment[None]) & (distance >= 0)
    if window is not None:
        mask &= distance <= window
    return mask.to(device)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    window: Window,
    scale: float,
    deterministic: bool = False,
) -> torch.Tensor:
    """See ``contract.attention``. Computed in fp32, or in fp64 if the inputs are."""
    del deterministic  # always
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k_heads, v_heads = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype) * scale, k_heads)
    scores = scores.masked_fill(~dense_mask(segments, window), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_heads).to(q.dtype)
