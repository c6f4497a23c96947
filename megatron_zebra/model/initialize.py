"""Initial weights, each from a seed of its own name, so that they do not depend on how the model is divided."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Initializer:
    """Makes parameters: normal(0, std), std / sqrt(2 num_layers) for projections into the residual stream, ones for norms."""

    seed: int
    std: float
    num_layers: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, name: str, *shape: int) -> torch.nn.Parameter:
        generator = torch.Generator().manual_seed(named_seed(self.seed, name))
        std = (
            self.std / (2 * self.num_layers) ** 0.5
            if name.endswith(("o_proj.weight", "down_proj.weight"))
            else self.std
        )
        return self._parameter(torch.empty(shape).normal_(0.0, std, generator=generator))

    def zeros(self, *shape: int) -> torch.nn.Parameter:
        return self._parameter(torch.zeros(shape))

    def ones(self, *shape: int) -> torch.nn.Parameter:
        return self._parameter(torch.ones(shape))

    def _parameter(self, value: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.to(self.device, self.dtype))


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
