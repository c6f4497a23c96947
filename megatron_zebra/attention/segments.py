"""Packed segments of a micro-batch: built once, shared by every layer, so that no kernel waits for the device."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megatron_zebra.attention.window import Int64

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Segments:
    """Where segments (documents) start and end among packed queries and keys.

    Segment s has queries ``cu_q[s] .. cu_q[s+1]`` and keys ``cu_k[s] .. cu_k[s+1]``, at least as many; its last query
    sees its last key. Segments never see each other. A segment may have no query, or be empty.
    """

    cu_q: Int64  # [segments + 1], on the host
    cu_k: Int64
    cu_q_device: torch.Tensor  # the same, int32, where the kernel runs
    cu_k_device: torch.Tensor
    max_q: int
    max_k: int
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def from_cu_seqlens(
        cu_q: Sequence[int] | npt.ArrayLike | torch.Tensor,
        cu_k: Sequence[int] | npt.ArrayLike | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "Segments":
        """From cumulative lengths, 0 first; ``cu_k`` None means the same as ``cu_q``.

        Give host values: a tensor on a device is copied from it here, once.
        """
        q = _cumulative(cu_q, "cu_seqlens_q")
        same = cu_k is None
        k = q if cu_k is None else _cumulative(cu_k, "cu_seqlens_k")
        if len(q) != len(k):
            raise ValueError(f"cu_seqlens_q has {len(q) - 1} segments, cu_seqlens_k has {len(k) - 1}")
        q_lengths, k_lengths = np.diff(q), np.diff(k)
        if np.any(q_lengths > k_lengths):
            s = int(np.argmax(q_lengths > k_lengths))
            raise ValueError(f"segment {s} has {q_lengths[s]} queries but only {k_lengths[s]} keys")
        q_device = torch.from_numpy(q.astype(np.int32)).to(device, non_blocking=True)
        k_device = q_device if same else torch.from_numpy(k.astype(np.int32)).to(device, non_blocking=True)
        return Segments(q, k, q_device, k_device, int(q_lengths.max(initial=0)), int(k_lengths.max(initial=0)))

    @staticmethod
    def from_lengths(
        q_lengths: Iterable[int], k_lengths: Iterable[int] | None = None, device: torch.device | str = "cpu"
    ) -> "Segments":
        """From each segment's number of queries and (if not the same) of keys."""

        def cumulative(lengths: Iterable[int]) -> Int64:
            return np.cumsum([0, *lengths], dtype=np.int64)

        return Segments.from_cu_seqlens(
            cumulative(q_lengths), None if k_lengths is None else cumulative(k_lengths), device
        )

    @property
    def total_q(self) -> int:
        return int(self.cu_q[-1])

    @property
    def total_k(self) -> int:
        return int(self.cu_k[-1])

    @property
    def q_lengths(self) -> Int64:
        return np.diff(self.cu_q)

    @property
    def k_lengths(self) -> Int64:
        return np.diff(self.cu_k)

    @property
    def fewer_queries(self) -> bool:
        """Whether any segment has fewer queries than keys."""
        return self.memo("fewer_queries", lambda: not np.array_equal(self.cu_q, self.cu_k))

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, called once per key: what a kernel derives from the boundaries is shared by all layers."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T = self._memo[key]
        return value


def _cumulative(values: Any, name: str) -> Int64:
    """[segments + 1] as checked host int64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    cu = np.array(values)
    if cu.ndim != 1 or len(cu) < 1 or cu.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list of integers, 0 first")
    cu = cu.astype(np.int64)
    if cu[0] != 0 or np.any(np.diff(cu) < 0):
        raise ValueError(f"{name} must start at 0 and never fall")
    if cu[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{name} ends at {cu[-1]}; kernels count in int32")
    cu.flags.writeable = False
    return cu
