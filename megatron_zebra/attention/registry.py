"""What each attention backend supports, and which one to take. Pure: names and strings, no torch.

A backend that cannot do what a layer asks is refused when the model is built, by name; nothing is ever left out silently.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_zebra.attention.window import Window, check_window


@dataclass(frozen=True)
class Backend:
    """One kernel and what it declares. ``module`` holds its ``attention`` function and is imported on first use."""

    name: str
    module: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    windows: bool = True
    grouped_queries: bool = True
    fewer_queries: bool = True  # segments of fewer queries than keys, aligned bottom-right
    deterministic: bool = True  # can give bitwise the same gradients twice
    packages: tuple[str, ...] = ()  # any one of these importable modules is enough
    install: str = ""


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "flash",
            "megatron_zebra.attention.flash",
            devices=("cuda",),
            dtypes=("float16", "bfloat16"),
            max_head_dim=256,
            head_dim_multiple=8,
            packages=("flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"),
            install="pip install 'megatron-zebra[gpu]'",
        ),
        Backend(
            "torch",
            "megatron_zebra.attention.torch_varlen",
            devices=("cuda",),
            dtypes=("float16", "bfloat16"),
            max_head_dim=256,
            head_dim_multiple=8,
            packages=("torch.nn.attention.varlen",),
            install="torch 2.13 or later",
        ),
        Backend(
            "cpu",
            "megatron_zebra.attention.cpu",
            devices=("cpu",),
            dtypes=("float64", "float32", "bfloat16", "float16"),
        ),
        Backend(
            "reference",
            "megatron_zebra.attention.reference",
            devices=("cpu", "cuda"),
            dtypes=("float64", "float32", "bfloat16", "float16"),
        ),
    )
}


@lru_cache(maxsize=64)
def module_exists(name: str) -> bool:
    """Whether ``name`` is installed, found without importing it or its parents."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if not rest:
        return True
    paths = [Path(location, *rest) for location in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


def dtype_name(dtype: object) -> str:
    """``torch.bfloat16`` or ``"bfloat16"`` or ``"bf16"`` -> ``"bfloat16"``."""
    name = str(dtype).removeprefix("torch.")
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(name, name)


def resolve_backend(name: str, device_type: str, dtype: object) -> str:
    """``auto``: cpu on a CPU; on CUDA flash-attn where installed, else torch's own. Any other name stays as it is."""
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"attention backend {name!r} does not exist; allowed: auto, {', '.join(BACKENDS)}")
        return name
    if device_type == "cpu":
        return "cpu"
    candidates = [b for b in (BACKENDS["flash"], BACKENDS["torch"]) if device_type in b.devices]
    for backend in candidates:
        if dtype_name(dtype) in backend.dtypes and any(map(module_exists, backend.packages)):
            return backend.name
    raise ValueError(f"no attention backend computes {dtype_name(dtype)} on {device_type}; use bf16 there, or a CPU")


@lru_cache(maxsize=1024)
def _refusal(
    name: str,
    device_type: str,
    dtype: str,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    windowed: bool,
    deterministic: bool,
    fewer_queries: bool,
) -> str | None:
    """Why the backend cannot do this, or None."""
    backend = BACKENDS.get(name)
    if backend is None:
        return f"does not exist; allowed: {', '.join(BACKENDS)}"
    if device_type not in backend.devices:
        return f"runs on {' or '.join(backend.devices)}, not on {device_type}"
    if dtype not in backend.dtypes:
        return f"computes in {', '.join(backend.dtypes)}, not in {dtype}"
    if head_dim < 1 or (backend.max_head_dim is not None and head_dim > backend.max_head_dim):
        return f"takes a head_dim of at most {backend.max_head_dim}, not {head_dim}"
    if head_dim % backend.head_dim_multiple:
        return f"takes a head_dim that is a multiple of {backend.head_dim_multiple}, not {head_dim}"
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        return f"needs num_heads to be a multiple of num_kv_heads, not {num_heads} and {num_kv_heads}"
    if num_heads != num_kv_heads and not backend.grouped_queries:
        return f"has no grouped-query attention ({num_heads} heads on {num_kv_heads})"
    if windowed and not backend.windows:
        return "has no windows, and this layer is local"
    if deterministic and not backend.deterministic:
        return "has no deterministic backward"
    if fewer_queries and not backend.fewer_queries:
        return "needs as many queries as keys in each segment"
    if backend.packages and not any(map(module_exists, backend.packages)):
        return f"is not installed ({backend.install})"
    return None


def check_backend(
    name: str,
    device_type: str,
    dtype: object,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    window: Window,
    *,
    layer: str = "",
    deterministic: bool = False,
    fewer_queries: bool = False,
) -> None:
    """Raise a ValueError of one line, naming backend and layer, if the backend cannot do what the layer asks."""
    windowed = check_window(window) is not None
    reason = _refusal(
        name,
        device_type,
        dtype_name(dtype),
        head_dim,
        num_heads,
        num_kv_heads,
        windowed,
        deterministic,
        fewer_queries,
    )
    if reason is not None:
        raise ValueError(f"attention backend {name!r}{f' of {layer}' if layer else ''} {reason}")


@lru_cache(maxsize=16)
def load_backend(name: str) -> Callable[..., Any]:
    """The backend's ``attention(q, k, v, segments, *, window, scale, deterministic)``."""
    function: Callable[..., Any] = importlib.import_module(BACKENDS[name].module).attention
    return function
