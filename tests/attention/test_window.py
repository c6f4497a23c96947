"""The window's convention, its counts and its borders."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.attention import window as w_
from megatron_zebra.attention.reference import dense_mask
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import allowed_pairs

windows = st.one_of(st.none(), st.integers(1, 70))
segment = st.tuples(st.integers(0, 60), st.integers(0, 40)).map(lambda x: (x[0], x[0] + x[1]))


def test_W01_window_is_w_plus_1_keys_self_included() -> None:
    assert w_.visible_range(10, 4) == (6, 11)
    assert w_.visible_range(2, 4) == (0, 3)
    assert w_.visible_range(10, None) == (0, 11)
    assert w_.visible_keys([0, 3, 4, 5, 11], 4).tolist() == [1, 4, 5, 5, 5]


@pytest.mark.parametrize("w", [1, 4, 512, None])
def test_W02_every_border_and_back(w: int | None) -> None:
    assert w_.from_hf(w_.to_hf(w)) == w
    assert w_.from_megatron(w_.to_megatron(w)) == w
    assert w_.from_megatron(w_.flash_window(w)) == w
    if w is not None:
        assert (w_.to_hf(w), w_.to_megatron(w), w_.flash_window(w), w_.flash4_window(w)) == (
            w + 1,
            (w, 0),
            (w, 0),
            (w, 0),
        )
    else:
        assert (w_.to_hf(w), w_.to_megatron(w), w_.flash_window(w), w_.flash4_window(w)) == (
            None,
            None,
            (-1, 0),
            (None, None),
        )


@pytest.mark.parametrize("value", [(4, 0), [4], 4.0, "4", True, (-1, -1)])
def test_P06_window_is_one_int_and_nothing_else(value: object) -> None:
    with pytest.raises(TypeError, match="window must be an int"):
        w_.check_window(value)


def test_window_below_1_is_an_error_and_numpy_ints_are_ints() -> None:
    for value in (0, -1, np.int64(0)):
        with pytest.raises(ValueError, match="at least 1"):
            w_.check_window(value)
    assert type(w_.check_window(np.int32(7))) is int
    for value in (0, 1, True):
        with pytest.raises(ValueError, match="sliding_window"):
            w_.from_hf(value)
    with pytest.raises(ValueError, match="causal"):
        w_.from_megatron((4, 4))


def test_effective_window_is_none_where_it_hides_nothing() -> None:
    assert w_.effective_window(9, 11) == 9
    assert w_.effective_window(9, 10) is None
    assert w_.effective_window(None, 10) is None


def test_F01_pairs_of_a_window_layer() -> None:
    assert allowed_pairs([32768], window=1023) == 33_030_656
    assert allowed_pairs([32768]) == 536_887_296
    assert allowed_pairs([1 << 20] * 4096) == 4096 * (1 << 19) * ((1 << 20) + 1)  # beyond int32, within int64


@settings(deadline=None, max_examples=100)
@given(st.lists(segment, max_size=5), windows)
def test_allowed_pairs_is_what_the_dense_mask_allows(lengths: list[tuple[int, int]], w: int | None) -> None:
    q, k = [x[0] for x in lengths], [x[1] for x in lengths]
    mask = dense_mask(Segments.from_lengths(q, k), w)
    assert allowed_pairs(q, k, w) == int(mask.sum())
    positions = [p for a, b in lengths for p in range(b - a, b)]
    assert mask.sum(1).tolist() == w_.visible_keys(np.array(positions, dtype=np.int64), w).tolist()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 30), st.integers(0, 50), st.integers(1, 20), windows)
def test_fetched_range_is_what_a_chunk_sees_before_itself(document: int, into: int, size: int, w: int | None) -> None:
    start = document + into
    seen = [document + j for i in range(size) for j in range(*w_.visible_range(into + i, w)) if document + j < start]
    first, stop = w_.fetched_range(start, document, w)
    assert stop == start
    assert list(range(first, stop)) == sorted(set(seen))


def test_allowed_pairs_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="queries"):
        allowed_pairs([3], [2])


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, megatron_zebra.attention.window, megatron_zebra.attention.registry as r;"
        "r.check_backend('cpu', 'cpu', 'float32', 64, 8, 2, 512); r.resolve_backend('auto', 'cpu', 'fp32');"
        "r.resolve_backend('auto', 'cuda', 'bf16'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
