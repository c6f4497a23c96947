"""torch's own varlen attention: flash attention 2 with windows, without the flash-attn package. CUDA only."""

from typing import Any

import torch

from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, flash_window


def arguments(segments: Segments, window: Window, scale: float, grouped: bool) -> dict[str, Any]:
    """Keyword arguments of ``varlen_attn``, beside q, k and v.

    It takes ``(-1, 0)`` for causal and ``(w, 0)`` for a causal window; ``(-1, -1)``, its default, would see the future.
    """
    return {
        "cu_seq_q": segments.cu_q_device,
        "cu_seq_k": segments.cu_k_device,
        "max_q": segments.max_q,
        "max_k": segments.max_k,
        "scale": scale,
        "window_size": flash_window(window),
        "enable_gqa": grouped,
    }


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
    """See ``contract.attention``."""
    from torch.nn.attention.varlen import varlen_attn

    if deterministic and (
        not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        # Its backward reads this global setting, and has no argument of its own.
        raise ValueError(
            "attention backend 'torch' is deterministic only under torch.use_deterministic_algorithms(True)"
        )
    out = varlen_attn(q, k, v, **arguments(segments, window, scale, q.shape[1] != k.shape[1]))
    assert isinstance(out, torch.Tensor)  # a pair only if the log-sum-exp was asked for
    return out
