"""The parts every block is made of: linear maps, RMSNorm, the embedding. Sizes given are those of the whole model."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.tensor import scatter_sum, sum_gradient


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in], or this rank's rows or columns of it."""

    def __init__(self, name: str, inputs: int, outputs: int, init: Initializer, bias: bool = False) -> None:
        super().__init__()
        self.weight = init.normal(f"{name}.weight", outputs, inputs)
        self.bias = init.zeros(f"{name}.bias", outputs) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class KVLinear(Linear):
    """The K or V projection: the rows of the KV heads that this rank uses, where it holds more than those."""

    def __init__(
        self, name: str, inputs: int, heads: int, head_dim: int, init: Initializer, bias: bool = False
    ) -> None:
        super().__init__(name, inputs, heads * head_dim, init, bias)
        self.tp = init.tp
        used = init.sharding.kv_heads()
        self.rows = slice(used.start * head_dim, used.stop * head_dim)
        self.whole = init.tp.size > heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.whole:
            return super().forward(x)
        bias = None if self.bias is None else sum_gradient(self.bias, self.tp)[self.rows]
        return F.linear(x, sum_gradient(self.weight, self.tp)[self.rows], bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x holds this rank's part of the tokens or heads."""

    def __init__(self, name: str, width: int, eps: float, init: Initializer) -> None:
        super().__init__()
        self.weight = init.ones(f"{name}.weight", width)
        self.eps, self.tp = eps, init.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), sum_gradient(self.weight, self.tp), self.eps)


class Embedding(nn.Module):
    """Rows of W [vocab_size, hidden_size] by token id [T] -> [T / tp, hidden_size], each rank holding a part of the rows."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, init: Initializer) -> None:
        super().__init__()
        self.weight = init.normal(f"{name}.weight", vocab_size, hidden_size)
        self.box = init.sharding.box(f"{name}.weight", (vocab_size, hidden_size))
        self.tp = init.tp

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        own = tokens - self.box.offsets[0]
        elsewhere = (own < 0) | (own >= self.box.shape[0])
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0.0)
        return scatter_sum(rows, self.tp)
