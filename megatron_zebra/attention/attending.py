"""What may stand in for a call of the kernel over plain segments: a KV cache, a measurement."""

from typing import Protocol

import torch

from megatron_zebra.attention.window import Window


class Attending(Protocol):
    """Computes attention in its own way, knowing which layer asks."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: Window, backend: str
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, Hkv, D] of layer ``layer``, rotated. Returns [T, H, D]."""
