"""The parts every block is made of: linear maps, RMSNorm, the embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_zebra.model.initialize import Initializer


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in]."""

    def __init__(self, name: str, inputs: int, outputs: int, init: Initializer, bias: bool = False) -> None:
        super().__init__()
        self.weight = init.normal(f"{name}.weight", outputs, inputs)
        self.bias = init.zeros(outputs) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float, init: Initializer) -> None:
        super().__init__()
        self.weight = init.ones(width)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of W [vocab_size, hidden_size] by token id."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, init: Initializer) -> None:
        super().__init__()
        self.weight = init.normal(f"{name}.weight", vocab_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight)
