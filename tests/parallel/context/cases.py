"""Attention of one whole micro-batch in one process, and of its parts on context-parallel ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window
from megatron_zebra.parallel.context.attend import attend
from megatron_zebra.parallel.context.shard import ContextParallel, ContextShard

NAMES = ("out", "dq", "dk", "dv")


def boundaries(lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens of documents of these lengths."""
    return np.cumsum([0, *lengths])


def ragged(rows: int, length: int, cuts: int, seed: int) -> np.ndarray:
    """cu_seqlens of rows cut at ``cuts`` random places, next to each other among them; some documents have 1 token."""
    rng = np.random.default_rng(seed)
    places = rng.integers(1, rows * length, cuts)
    places[: cuts // 4] = places[cuts // 4 : 2 * (cuts // 4)] + 1
    return np.unique(np.concatenate([np.arange(rows + 1) * length, np.minimum(places, rows * length)]))


@dataclass(frozen=True)
class Whole:
    """q, k, v and the gradient of the output, of a whole micro-batch."""

    cu: np.ndarray
    rows: int
    length: int
    tensors: tuple[torch.Tensor, ...]

    @staticmethod
    def make(
        cu: Sequence[int] | np.ndarray,
        rows: int,
        length: int,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 4,
        dtype: torch.dtype = torch.float64,
    ) -> "Whole":
        generator = torch.Generator().manual_seed(len(cu))
        tensors = tuple(
            torch.randn(rows * length, h, head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for h in (heads[0], heads[1], heads[1], heads[0])
        )
        return Whole(np.asarray(cu), rows, length, tensors)

    def reference(self, window: Window, documents: np.ndarray | None = None) -> list[torch.Tensor]:
        """Output, dq, dk, dv by the dense mask."""
        q, k, v = (x.clone().requires_grad_() for x in self.tensors[:3])
        segments = Segments.from_cu_seqlens(self.cu if documents is None else documents)
        out = attention(q, k, v, segments, window=window, backend="reference")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.tensors[3])]

    def shard(self, context: ContextParallel) -> ContextShard:
        return ContextShard(self.cu, self.rows, self.length, context, "cpu")

    def part(self, shard: ContextShard, window: Window, backend: str = "cpu") -> list[torch.Tensor]:
        """Output, dq, dk, dv of this rank's tokens."""
        q, k, v, d_out = (x[shard.local_index] for x in self.tensors)
        for x in (q, k, v):
            x.requires_grad_()
        out = attend(q, k, v, shard, window=window, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def error(ours: Sequence[torch.Tensor], right: Sequence[torch.Tensor], index: np.ndarray) -> float:
    """Largest difference of any element, ``right`` being of the whole micro-batch."""
    return max(
        (a.double() - b[index].double()).abs().max().item() if a.shape == b[index].shape else float("inf")
        for a, b in zip(ours, right, strict=True)
    )
