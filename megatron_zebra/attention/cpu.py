"""CPU attention: one autograd function over torch's flash kernel for the CPU, called on tiles (see ``blocks``).

The kernel reads grouped queries natively, takes any strides, and its backward accepts an output and log-sum-exp that were
computed over more keys than it is given; so partial results merge exactly, and dq, dk, dv of the tiles add up.
A window layer costs O(S · w) in both directions and no mask is larger than one tile.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_zebra.attention.blocks import Padded, Plan, Tiles, plan
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CHUNK_BYTES = 8 << 20  # of one tile batch's keys: bounds the gradients that wait to be added up


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
    """See ``contract.attention``. Sums run in one fixed order, so it is always deterministic."""
    del deterministic
    calls = segments.memo(("cpu", window), lambda: plan(segments.cu_q, segments.cu_k, window))
    out: torch.Tensor = _CpuAttention.apply(q, k, v, calls, scale)
    return out


@lru_cache(maxsize=16)
def _band_mask(lead: int, rows: int, keys: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, rows, keys], 0 or -inf: row r sees keys ``lead + r - window .. lead + r`` of the tile."""
    distance = torch.arange(rows)[:, None] + lead - torch.arange(keys)[None]
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_((distance < 0) | (distance > window), float("-inf"))[
        None, None
    ]


def _tiles_mask(tiles: Tiles, window: Window, dtype: torch.dtype) -> torch.Tensor | None:
    if tiles.kind != "band":
        return None
    assert window is not None
    return _band_mask(window, tiles.rows, tiles.keys, window, dtype)


def _padded_mask(padded: Padded, window: Window, dtype: torch.dtype) -> torch.Tensor | None:
    if not padded.banded:
        return None
    assert window is not None
    return _band_mask(0, padded.length, padded.length, window, dtype)


def _view(x: torch.Tensor, start: int, count: int, step: int, length: int) -> torch.Tensor:
    """[T, H, ...] -> [count, H, length, ...]: overlapping windows of rows, no copy."""
    row = x.stride(0)
    shape = (count, x.shape[1], length, *x.shape[2:])
    strides = (step * row, x.stride(1), row, *x.stride()[2:])
    return x.as_strided(shape, strides, x.storage_offset() + start * row)


def _chunks(tiles: Tiles, key_row_bytes: int) -> list[Tiles]:
    """The same tiles in batches whose keys take about CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (tiles.keys * key_row_bytes))
    if tiles.count <= size:
        return [tiles]
    return [
        Tiles(
            tiles.kind,
            tiles.q_start + t * tiles.rows,
            tiles.k_start + t * tiles.rows,
            tiles.rows,
            tiles.keys,
            min(size, tiles.count - t),
            tiles.merge,
        )
        for t in range(0, tiles.count, size)
    ]


def _gather(x: torch.Tensor, source: Any, padded: Padded) -> torch.Tensor:
    """[T, H, ...] -> [count, H, length, ...], zero where padded."""
    rows = x.new_zeros(padded.count * padded.length, *x.shape[1:])
    rows.index_copy_(0, torch.from_numpy(padded.target), x.index_select(0, torch.from_numpy(source)))
    return rows.view(padded.count, padded.length, *x.shape[1:]).transpose(1, 2)


def _scatter(out: torch.Tensor, source: Any, padded: Padded, piece: torch.Tensor) -> None:
    """The inverse of _gather: write the unpadded rows of [count, H, length, ...]. Each row has one segment."""
    rows = piece.transpose(1, 2).reshape(padded.count * padded.length, *out.shape[1:])
    out.index_copy_(0, torch.from_numpy(source), rows.index_select(0, torch.from_numpy(padded.target)).to(out.dtype))


def _fold(grad: torch.Tensor, tiles: Tiles, piece: torch.Tensor) -> None:
    """Add [count, Hkv, keys, D] to the overlapping key rows [Tk, Hkv, D] that the tiles read."""
    for offset in range(0, tiles.keys, tiles.rows):
        width = min(tiles.rows, tiles.keys - offset)
        target = _view(grad, tiles.k_start + offset, tiles.count, tiles.rows, width)
        target += piece[:, :, offset : offset + width]


class _CpuAttention(torch.autograd.Function):
    """q [Tq, H, D], k and v [Tk, Hkv, D] -> out [Tq, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: Plan, scale: float) -> torch.Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for tiles in calls.tiles:
            mask = _tiles_mask(tiles, calls.window, q.dtype)
            for part in _chunks(tiles, k.shape[1] * k.shape[2] * k.element_size()):
                o_part, l_part = _forward(
                    _view(q, part.q_start, part.count, part.rows, part.rows),
                    _view(k, part.k_start, part.count, part.rows, part.keys),
                    _view(v, part.k_start, part.count, part.rows, part.keys),
                    0.0,
                    part.kind == "causal",
                    attn_mask=mask,
                    scale=scale,
                )
                o_view = _view(out, part.q_start, part.count, part.rows, part.rows)
                l_view = _view(lse, part.q_start, part.count, part.rows, part.rows)
                if part.merge:
                    both = torch.logaddexp(l_view, l_part)
                    o_view.copy_(o_view * (l_view - both).exp()[..., None] + o_part * (l_part - both).exp()[..., None])
                    l_view.copy_(both)
                else:
                    o_view.copy_(o_part)
                    l_view.copy_(l_part)
        for padded in calls.padded:
            o_part, l_part = _forward(
                _gather(q, padded.q_source, padded),
                _gather(k, padded.k_source, padded),
                _gather(v, padded.k_source, padded),
                0.0,
                not padded.banded,
                attn_mask=_padded_mask(padded, calls.window, q.dtype),
                scale=scale,
            )
            _scatter(out, padded.q_source, padded, o_part)
            _scatter(lse, padded.q_source, padded, l_part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        calls: Plan = ctx.calls
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        sums = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros(q.shape, dtype=sums if calls.merges else q.dtype)
        dk = torch.zeros(k.shape, dtype=sums)
        dv = torch.zeros(v.shape, dtype=sums)
        for tiles in calls.tiles:
            mask = _tiles_mask(tiles, calls.window, q.dtype)
            for part in _chunks(tiles, k.shape[1] * k.shape[2] * k.element_size()):
                of_queries = (part.q_start, part.count, part.rows, part.rows)
                of_keys = (part.k_start, part.count, part.rows, part.keys)
                pieces = _backward(
                    _view(d_out, *of_queries),
                    _view(q, *of_queries),
                    _view(k, *of_keys),
                    _view(v, *of_keys),
                    _view(out, *of_queries),
                    _view(lse, *of_queries),
                    0.0,
                    part.kind == "causal",
                    attn_mask=mask,
                    scale=ctx.scale,
                )
                dq_view = _view(dq, *of_queries)
                if part.merge:
                    dq_view += pieces[0]
                else:
                    dq_view.copy_(pieces[0])
                _fold(dk, part, pieces[1])
                _fold(dv, part, pieces[2])
        for padded in calls.padded:
            pieces = _backward(
                *(_gather(x, padded.q_source, padded) for x in (d_out, q)),
                *(_gather(x, padded.k_source, padded) for x in (k, v)),
                *(_gather(x, padded.q_source, padded) for x in (out, lse)),
                0.0,
                not padded.banded,
                attn_mask=_padded_mask(padded, calls.window, q.dtype),
                scale=ctx.scale,
            )
            _scatter(dq, padded.q_source, padded, pieces[0])
            _scatter(dk, padded.k_source, padded, pieces[1])
            _scatter(dv, padded.k_source, padded, pieces[2])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
