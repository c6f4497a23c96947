"""CPU attention: one autograd function over torch's flash kernel for the CPU, called on the tiles of ``blocks``.

The kernel reads grouped queries natively, takes any strides, and its backward accepts an output and log-sum-exp over more
keys than it is given; so results over parts of the keys merge exactly, and the tiles' gradients add up.
A window layer costs O(S · w) in both directions, and no mask is larger than one tile.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_zebra.attention.blocks import Plan, plan
from megatron_zebra.attention.cpu_access import accesses
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    if len(q) == 1 and window is None and segments.cu_q.size == 2 and not torch.is_grad_enabled():
        # A token that is generated: one call, in which a KV head's queries are rows, so that its keys are read once.
        wide, keys, values = _computable(q, k, v)
        rows = wide.view(1, k.shape[1], -1, k.shape[2])
        return _forward(rows, _batch_of_one(keys), _batch_of_one(values), scale=scale)[0].reshape(q.shape).to(q.dtype)
    group = q.shape[1] // k.shape[1]
    calls = segments.memo(("cpu", window, group), lambda: plan(segments.cu_q, segments.cu_k, window, group))
    if not torch.is_grad_enabled():
        return _attend(calls, scale, *_computable(q, k, v))[0].to(q.dtype)
    out: torch.Tensor = _CpuAttention.apply(q, k, v, calls, scale)
    return out


def _computable(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In at least fp32, heads' elements side by side.

    The kernel knows bf16, but without the instructions for it a CPU takes ten times as long for its backward as in fp32.
    """
    wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in wide]


class _CpuAttention(torch.autograd.Function):
    """q [Tq, H, D], k and v [Tk, Hkv, D] -> out [Tq, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: Plan, scale: float) -> torch.Tensor:
        out, lse = _attend(calls, scale, *_computable(q, k, v))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = _gradients(ctx.calls, ctx.scale, lse, *_computable(d_out, q, k, v, out))
        return *(g.to(q.dtype) for g in gradients), None, None


def _attend(
    calls: Plan, scale: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Tq, H, D] and log-sum-exp of the scores [Tq, H]."""
    if calls.whole:
        o, l = _forward(*map(_batch_of_one, (q, k, v)), 0.0, True, scale=scale)
        return o[0].transpose(0, 1), l[0].transpose(0, 1)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])
    for call in accesses(calls, k):
        o, l = _forward(call.queries(q), call.keys(k), call.keys(v), 0.0, call.causal, attn_mask=call.mask, scale=scale)
        if call.merge:
            o_before, l_before = call.queries(out), call.queries(lse)
            l_both = torch.logaddexp(l_before, l)
            o = o_before * (l_before - l_both).exp()[..., None] + o * (l - l_both).exp()[..., None]
            l = l_both
        call.put_queries(out, o)
        call.put_queries(lse, l)
    return out, lse


def _gradients(
    calls: Plan,
    scale: float,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, shaped as q, k, v."""
    if calls.whole:
        pieces = _backward(*map(_batch_of_one, (d_out, q, k, v, out, lse)), 0.0, True, scale=scale)
        return tuple(piece[0].transpose(0, 1) for piece in pieces)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for call in accesses(calls, k):
        q_piece, k_piece, v_piece = _backward(
            call.queries(d_out),
            call.queries(q),
            call.keys(k),
            call.keys(v),
            call.queries(out),
            call.queries(lse),
            0.0,
            call.causal,
            attn_mask=call.mask,
            scale=scale,
        )
        (call.add_queries if call.merge else call.put_queries)(dq, q_piece)
        call.add_keys(dk, k_piece)
        call.add_keys(dv, v_piece)
    return dq, dk, dv


def _batch_of_one(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, ...] -> [1, heads, T, ...]."""
    return x.transpose(0, 1)[None]
