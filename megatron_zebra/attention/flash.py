"""flash-attn: version 2, and 3 or 4 where installed. All know windows; each writes them its own way."""

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from megatron_zebra.attention.registry import module_exists
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, flash4_window, flash_window
from megatron_zebra.errors import UserError

MODULES = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface", 4: "flash_attn.cute"}


def choose_version(capability: tuple[int, int], head_dim: int, installed: frozenset[int]) -> int:
    """Which flash-attn computes this on a GPU of that compute capability; the best installed one."""
    major = capability[0]
    able = []
    if major == 9:
        able.append(3)
    if 8 <= major <= 9:
        able.append(2)
    if 9 <= major <= 12 and head_dim <= 128:
        able.append(4)
    for version in able:
        if version in installed:
            return version
    raise ValueError(
        f"attention backend 'flash': no installed flash-attn (found {sorted(installed) or 'none'}) computes head_dim "
        f"{head_dim} on compute capability {major}.{capability[1]}; those that would: {sorted(able) or 'none'}"
    )


def arguments(version: int, segments: Segments, window: Window, scale: float, deterministic: bool) -> dict[str, Any]:
    """Keyword arguments of that version's ``flash_attn_varlen_func``, beside q, k and v.

    Only keywords: the order of arguments differs between the versions.
    """
    return {
        "cu_seqlens_q": segments.cu_q_device,
        "cu_seqlens_k": segments.cu_k_device,
        "max_seqlen_q": segments.max_q,
        "max_seqlen_k": segments.max_k,
        "softmax_scale": scale,
        "causal": True,
        "window_size": flash4_window(window) if version == 4 else flash_window(window),
        "deterministic": deterministic,
    }


@lru_cache(maxsize=8)
def _function(version: int) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = importlib.import_module(MODULES[version]).flash_attn_varlen_func
    except ImportError as error:
        # The commonest reason: it was built for another torch.
        raise UserError(
            f"attention backend 'flash': {MODULES[version]} is installed but cannot be imported ({error}); build flash-attn "
            f"for torch {torch.__version__}, or set model.attention_backend: torch"
        ) from None
    return function


@lru_cache(maxsize=64)
def _version(device: torch.device, head_dim: int) -> int:
    installed = frozenset(version for version, module in MODULES.items() if module_exists(module))
    return choose_version(torch.cuda.get_device_capability(device), head_dim, installed)


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
    version = _version(q.device, q.shape[2])
    result = _function(version)(q, k, v, **arguments(version, segments, window, scale, deterministic))
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result  # 4 also returns the log-sum-exp
    return out
