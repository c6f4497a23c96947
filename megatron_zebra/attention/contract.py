"""The one attention function that every layer calls, whatever computes it."""

import torch

from megatron_zebra.attention.registry import check_backend, load_backend
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, effective_window

__all__ = ["Segments", "attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    window: Window,
    backend: str,
    scale: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Causal attention over packed segments; each query sees ``window + 1`` keys, itself included (None: all before it).

    q: [Tq, H, D]; k, v: [Tk, Hkv, D] with H a multiple of Hkv (query head h reads key head ``h // (H // Hkv)``).
    Returns [Tq, H, D]. Segment s's queries are its last ones: aligned bottom-right. ``scale`` None is ``D ** -0.5``.
    ``backend`` is a resolved name (see ``registry.resolve_backend``).
    """
    _check_shapes(q, k, v, segments)
    check_backend(
        backend,
        q.device.type,
        q.dtype,
        q.shape[2],
        q.shape[1],
        k.shape[1],
        window,
        deterministic=deterministic,
        fewer_queries=segments.fewer_queries,
    )
    window = effective_window(window, segments.max_k)
    if segments.max_q == 0:
        # No query: an empty output that still reaches k and v in backward, since whoever fetched them waits for it.
        return q + 0 * (k.sum() + v.sum()).to(q.dtype)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out: torch.Tensor = load_backend(backend)(
        q, k, v, segments, window=window, scale=scale, deterministic=deterministic
    )
    return out


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention needs q [Tq, H, D] and k, v [Tk, Hkv, D], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if segments.cu_q_device.device != q.device:
        raise ValueError(f"segments are on {segments.cu_q_device.device}, but q is on {q.device}")
    if q.shape[0] != segments.total_q or k.shape[0] != segments.total_k:
        raise ValueError(
            f"segments describe {segments.total_q} queries and {segments.total_k} keys, "
            f"but there are {q.shape[0]} and {k.shape[0]}"
        )
