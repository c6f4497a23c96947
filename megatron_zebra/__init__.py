"""Megatron-Zebra: distributed training of long-context language models with grouped local-global attention."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_zebra.inference.load import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imports torch, which not everything here needs
        from megatron_zebra.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
