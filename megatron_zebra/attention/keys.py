"""Where a layer finds keys beside those it is given: what a KV cache offers the attention layers."""

from typing import Protocol

import torch

from megatron_zebra.attention.window import Window


class KeptKeys(Protocol):
    """Keys and values of earlier tokens, layer by layer."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: Window, backend: str
    ) -> torch.Tensor:
        """Attention of new tokens over what is kept and themselves; what later tokens need of them is kept.

        q: [T, H, D]; k, v: [T, Hkv, D], rotated. Returns [T, H, D].
        """
