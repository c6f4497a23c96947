"""Activations that are not kept for backward but computed again in it."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def computed_again(part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, offload: bool) -> torch.Tensor:
    """``part(x)``, of which only ``x`` is kept: on its device, or with ``offload`` in host memory.

    ``part`` must compute the same when it is called again.
    """
    device, kept = x.device, x.cpu() if offload else x  # a checkpoint keeps its arguments as they are given

    def again(x: torch.Tensor) -> torch.Tensor:
        return part(x.to(device))

    return checkpoint(again, kept, use_reentrant=False, preserve_rng_state=False)
