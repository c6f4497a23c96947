"""The parts every block is made of: linear maps, RMSNorm, the embedding. Sizes given are those of the whole model."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.tensor import scatter_sum, sum_gradient


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in], or this rank's rows or columns of it.

    With an adapter (``Initializer.lora``) y = x (W + alpha / rank B A)^T + b, A [rank, in], B [out, rank].
    """

    def __init__(self, name: str, inputs: int, outputs: int, init: Initializer, bias: bool = False) -> None:
        super().__init__()
        self.weight = init.normal(f"{name}.weight", outputs, inputs)
        self.bias = init.zeros(f"{name}.bias", outputs) if bias else None
        self.tp = init.tp
        rank = init.lora.rank if name.split(".")[-1] in init.lora.targets else 0
        # B is zero, so training begins at the function of W alone.
        self.lora_a = init.normal(f"{name}.lora_a", rank, inputs, std=inputs**-0.5) if rank else None
        self.lora_b = init.zeros(f"{name}.lora_b", outputs, rank) if rank else None
        self.lora_scale = init.lora.alpha / rank if rank else 0.0
        split = init.sharding.dimension
        # What is whole on every rank sees a part of the outputs (A) or of the inputs (B): its gradient is part of a sum.
        self.whole_a, self.whole_b = split(f"{name}.lora_a") is None, split(f"{name}.lora_b") is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_a is None else self._adapted(x, y)

    def _adapted(self, x: torch.Tensor, y: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """``y`` and what the adapter adds; ``rows`` of B."""
        if self.lora_a is None or self.lora_b is None:
            return y
        a = sum_gradient(self.lora_a, self.tp) if self.whole_a else self.lora_a
        b = sum_gradient(self.lora_b, self.tp) if self.whole_b else self.lora_b
        return y + F.linear(F.linear(x, a) * self.lora_scale, b[rows])


class KVLinear(Linear):
    """The K or V projection: the rows of the KV heads that this rank uses, where it holds more than those."""

    def __init__(
        self, name: str, inputs: int, heads: int, head_dim: int, init: Initializer, bias: bool = False
    ) -> None:
        super().__init__(name, inputs, heads * head_dim, init, bias)
        used = init.sharding.kv_heads()
        self.rows = slice(used.start * head_dim, used.stop * head_dim)
        self.whole = init.tp.size > heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.whole:
            return super().forward(x)
        bias = None if self.bias is None else sum_gradient(self.bias, self.tp)[self.rows]
        return self._adapted(x, F.linear(x, sum_gradient(self.weight, self.tp)[self.rows], bias), self.rows)


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
