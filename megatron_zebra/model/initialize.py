"""Initial weights, each from a seed of its own name, so that they do not depend on how the model is divided."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_zebra.config.sections import Lora
from megatron_zebra.parallel.group import Group
from megatron_zebra.parallel.sharding import Sharding


@dataclass(frozen=True)
class Initializer:
    """Makes parameters: normal(0, std), std / sqrt(2 num_layers) for projections into the residual stream, ones for norms.

    Names and shapes are those of the whole parameter; what comes is the part of it that ``sharding`` gives this rank of
    ``tp``. It carries what the optimizer and checkpoints must know: ``full_name``, ``full_shape``, ``box`` (which part),
    and ``tensor_model_parallel`` (whether other ranks hold other parts: DeepSpeed's norm asks for it). ``trained`` says by
    name which parameters have a gradient; ``lora`` which projections have adapters. ``blank`` makes zeros of all weights but
    adapters: they are about to be loaded, and billions of random numbers take minutes.
    """

    seed: int
    std: float
    num_layers: int
    dtype: torch.dtype
    device: torch.device
    tp: Group = field(default_factory=lambda: Group.alone("tp"))
    sharding: Sharding = field(default_factory=Sharding)
    trained: Callable[[str], bool] = lambda name: True
    lora: Lora = field(default_factory=Lora)
    blank: bool = False

    def normal(self, name: str, *shape: int, std: float | None = None) -> torch.nn.Parameter:
        if std is None:
            if self.blank:
                return self.zeros(name, *shape)
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = self.std / (2 * self.num_layers) ** 0.5 if into_stream else self.std
        generator = torch.Generator().manual_seed(named_seed(self.seed, name))
        return self._parameter(name, torch.empty(shape).normal_(0.0, std, generator=generator))

    def zeros(self, name: str, *shape: int) -> torch.nn.Parameter:
        return self._parameter(name, torch.zeros(shape))

    def ones(self, name: str, *shape: int) -> torch.nn.Parameter:
        return self._parameter(name, torch.ones(shape))

    def _parameter(self, name: str, whole: torch.Tensor) -> torch.nn.Parameter:
        box = self.sharding.box(name, tuple(whole.shape))
        own = whole
        if box.padded != whole.shape:
            own = torch.zeros(box.padded)  # padding stays zero: it has no gradient
            own[tuple(map(slice, box.shape))] = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape))]
        param: Any = torch.nn.Parameter(own.to(self.device, self.dtype))
        param.full_name, param.full_shape, param.box = name, tuple(whole.shape), box
        param.tensor_model_parallel = self.sharding.dimension(name) is not None
        param.requires_grad_(self.trained(name))
        return param


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
