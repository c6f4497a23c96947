"""The CPU kernel in use: autograd, layouts, recomputation, inference, and any segments at all."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_zebra.attention import blocks, cpu_access
from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from tests.attention import cases
from tests.attention.cases import Inputs, inputs, run

segment = st.one_of(st.tuples(st.integers(0, 90), st.just(0)), st.tuples(st.integers(0, 90), st.integers(0, 120))).map(
    lambda x: (x[0], x[0] + x[1])
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(segment, min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 150)),
    st.sampled_from([(1, 1), (4, 1), (4, 2)]),
)
def test_any_segments_and_window(lengths: list[tuple[int, int]], window: int | None, heads: tuple[int, int]) -> None:
    case = inputs([q for q, _ in lengths], [k for _, k in lengths], heads, head_dim=4)
    cases.assert_equal(run(case, window=window, backend="cpu"), run(case, window=window, backend="reference"))


@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
def test_batches_of_tiles_of_any_size(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs([600, 300])
    right = run(case, window=40, backend="reference")
    monkeypatch.setattr(cpu_access, "CHUNK_BYTES", chunk_bytes)
    cases.assert_equal(run(case, window=40, backend="cpu"), right)


@pytest.mark.parametrize("rows", [8, 33, 100])
def test_tiles_of_any_height(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter than, longer than and not dividing the window."""
    case = inputs([500, 77], [500, 140])
    right = run(case, window=70, backend="reference")
    monkeypatch.setattr(blocks, "band_rows", lambda window, group: rows)
    cases.assert_equal(run(case, window=70, backend="cpu"), right)


def test_a_large_window_with_tall_tiles() -> None:
    case = inputs([2500], None, (1, 1), head_dim=4)
    assert blocks.band_rows(1100, 1) > 200
    cases.assert_equal(run(case, window=1100, backend="cpu"), run(case, window=1100, backend="reference"))


@pytest.mark.parametrize("window", [5, None])
def test_no_query_still_reaches_the_keys_in_backward(window: int | None) -> None:
    case = inputs([0, 0], [3, 4])
    ours = run(case, window=window, backend="cpu")
    assert ours[0].shape == (0, 4, 8)
    assert all(not g.any() for g in ours[1:])
    assert ours[2].shape == case.k.shape


@pytest.mark.parametrize("window", [5, None])
def test_keys_without_queries_get_a_zero_gradient(window: int | None) -> None:
    """One causal segment, and one whose queries are all elsewhere."""
    case = inputs([40, 0], [40, 9])
    ours = run(case, window=window, backend="cpu")
    cases.assert_equal(ours, run(case, window=window, backend="reference"))
    assert not ours[2][40:].any()


@pytest.mark.parametrize("window", [20, None])
def test_recomputation(window: int | None) -> None:
    case = inputs([150, 3, 90])
    plain = run(case, window=window, backend="cpu")

    def recomputed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
        return checkpoint(
            lambda *x: attention(*x, segments, window=window, backend="cpu") * 1.0, q, k, v, use_reentrant=False
        )

    assert all(torch.equal(a, b) for a, b in zip(run(case, recomputed), plain))


def test_one_tensor_as_q_k_and_v() -> None:
    x = inputs([150, 40], None, (2, 2)).q
    segments = Segments.from_lengths([150, 40])
    ours, right = (
        torch.autograd.grad(attention(x, x, x, segments, window=30, backend=b).square().sum(), x)[0]
        for b in ("cpu", "reference")
    )
    assert (ours - right).abs().max() < 1e-12


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    case = inputs([150, 40])
    right = run(case, window=30, backend="cpu")[1:]
    tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((case.q, case.k, case.v))]
    attention(*tensors, case.segments, window=30, backend="cpu").backward(case.d_out)
    for i, x in enumerate(tensors):
        assert (x.grad is not None) == (i in wanted)
        assert x.grad is None or torch.equal(x.grad, right[i])


@pytest.mark.parametrize("window", [30, None])
@pytest.mark.parametrize("lengths", [[190], [150, 40]])
def test_inputs_and_gradients_of_any_layout(lengths: list[int], window: int | None) -> None:
    """Slices of one fused projection, heads first, elements not side by side; an expanded gradient."""
    plain = inputs(lengths, None, (4, 2))
    with torch.no_grad():
        fused = torch.cat([plain.q, plain.k, plain.v], dim=1).flatten(1)
        q, k, v = (x.unflatten(1, (-1, 8)) for x in fused.split([32, 16, 16], dim=1))
        heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        inside_out = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    ones = torch.ones((), dtype=torch.float64).expand(plain.d_out.shape)
    right = run(Inputs(plain.q, plain.k, plain.v, ones, plain.segments), window=window, backend="reference")
    for tensors in ([q, k, v], heads_first, inside_out):
        leaves = [x.requires_grad_() for x in tensors]
        cases.assert_equal(run(Inputs(*leaves, ones, plain.segments), window=window, backend="cpu"), right)


def test_inference_and_scale() -> None:
    case = inputs([150, 40])
    right = attention(case.q, case.k, case.v, case.segments, window=30, backend="reference", scale=0.3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(case.q, case.k, case.v, case.segments, window=30, backend="cpu", scale=0.3)
        assert not out.requires_grad
        assert (out - right).abs().max() < 1e-12


def test_one_query_at_a_time_is_the_whole() -> None:
    """Decoding with a cache: each step's queries are the last of its keys."""
    case = inputs([90])
    with torch.no_grad():
        for window in (17, None):
            whole = attention(case.q, case.k, case.v, case.segments, window=window, backend="cpu")
            steps = [
                attention(
                    case.q[t : t + 1],
                    case.k[: t + 1],
                    case.v[: t + 1],
                    Segments.from_lengths([1], [t + 1]),
                    window=window,
                    backend="cpu",
                )
                for t in range(90)
            ]
            assert (torch.cat(steps) - whole).abs().max() < 1e-12


def test_gradients_are_bitwise_the_same_twice() -> None:
    case = inputs([400, 33, 21, 60], None, (8, 2), dtype=torch.float32)
    first, second = (run(case, window=50, backend="cpu", deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_derivatives_are_refused_not_wrong() -> None:
    case = inputs([20])
    out = attention(case.q, case.k, case.v, case.segments, window=5, backend="cpu")
    (dq,) = torch.autograd.grad(out.sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dq.sum().backward()


def test_the_cut_is_made_once_for_all_layers() -> None:
    segments = Segments.from_lengths([150, 40])
    x = torch.zeros(190, 2, 8)
    with mock.patch("megatron_zebra.attention.cpu.plan", wraps=blocks.plan) as plan:
        for window in (30, None, 30, 30, None, 500):
            attention(x, x, x, segments, window=window, backend="cpu")
    assert plan.call_count == 2  # one for the local layers, one for the global ones; 500 hides nothing
    assert np.array_equal(segments.cu_q, [0, 150, 190])
