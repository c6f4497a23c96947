"""Segments: what they accept, hold and share."""

import numpy as np
import pytest
import torch

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments


def test_lengths_and_cumulative_lengths_agree() -> None:
    a = Segments.from_lengths([3, 0, 2], [3, 4, 5])
    b = Segments.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), np.array([0, 3, 7, 12]))
    for s in (a, b):
        assert s.cu_q.tolist() == s.cu_q_device.tolist() == [0, 3, 3, 5]
        assert s.cu_k.tolist() == s.cu_k_device.tolist() == [0, 3, 7, 12]
        assert s.cu_q_device.dtype == s.cu_k_device.dtype == torch.int32
        assert (s.max_q, s.max_k, s.total_q, s.total_k) == (3, 5, 5, 12)
        assert type(s.max_q) is int
        assert s.fewer_queries
    assert not Segments.from_lengths([3, 0, 2]).fewer_queries


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([1, 2], None, "start at 0"),
        ([0, 3, 2], None, "never fall"),
        ([0.0, 3.0], None, "integers"),
        ([], None, "integers"),
        ([0, 3], [0, 3, 4], "1 segments"),
        ([0, 1, 4], [0, 2, 4], "segment 1 has 3 queries but only 2 keys"),
        ([0, 1 << 31], None, "int32"),
    ],
)
def test_bad_boundaries_are_named(cu_q: list[int], cu_k: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.from_cu_seqlens(cu_q, cu_k)


def test_boundaries_are_not_shared_mutable_state() -> None:
    cu = np.array([0, 3, 5])
    segments = Segments.from_cu_seqlens(cu)
    cu[1] = 4
    assert segments.cu_q.tolist() == [0, 3, 5]
    with pytest.raises(ValueError):
        segments.cu_q[1] = 4


def test_memo_makes_once() -> None:
    segments, made = Segments.from_lengths([3]), []
    for _ in range(2):
        assert segments.memo("x", lambda: made.append(1) or 5) == 5  # type: ignore[func-returns-value]
    assert made == [1]


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((5, 4, 8), (5, 2, 8), (5, 4, 8), "attention needs"),
        ((5, 4, 8), (5, 2, 16), (5, 2, 16), "attention needs"),
        ((1, 5, 4, 8), (5, 2, 8), (5, 2, 8), "attention needs"),
        ((4, 4, 8), (5, 2, 8), (5, 2, 8), "5 queries and 5 keys, but there are 4 and 5"),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8), "multiple of num_kv_heads"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), Segments.from_lengths([5]), window=2, backend="cpu")


def test_mixed_dtypes_are_refused() -> None:
    q, k = torch.zeros(5, 4, 8), torch.zeros(5, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k, k, Segments.from_lengths([5]), window=2, backend="cpu")
