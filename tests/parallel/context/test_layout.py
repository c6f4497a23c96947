"""Which tokens a rank holds."""

import numpy as np
import pytest

from megatron_zebra.parallel.context.layout import ORDERS, local_index, owned_spans, ranges, stretches


def test_zigzag_gives_a_rank_chunks_r_and_its_mirror() -> None:
    assert owned_spans(1, 3, 1, 12, "zigzag").tolist() == [[2, 4], [8, 10]]
    assert owned_spans(0, 2, 2, 8, "zigzag").tolist() == [[0, 2], [6, 8], [8, 10], [14, 16]]


def test_contiguous_gives_a_rank_chunk_r() -> None:
    assert owned_spans(0, 3, 2, 12, "contiguous").tolist() == [[0, 4], [12, 16]]
    assert owned_spans(1, 3, 2, 12, "contiguous").tolist() == [[4, 8], [16, 20]]


def test_stretches_join_what_touches() -> None:
    assert stretches(2, 3, 1, 12, "zigzag").tolist() == [[4, 8]]
    assert stretches(0, 2, 2, 8, "zigzag").tolist() == [[0, 2], [6, 10], [14, 16]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_every_token_has_one_rank_and_ranks_have_equal_shares(cp: int, rows: int, order) -> None:
    length = 48
    held = [local_index(rank, cp, rows, length, order) for rank in range(cp)]
    assert all(len(tokens) == rows * length // cp and np.all(np.diff(tokens) > 0) for tokens in held)
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(rows * length))


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_zigzag_ranks_have_equal_causal_work(cp: int) -> None:
    work = {int((local_index(rank, cp, 1, 48, "zigzag") + 1).sum()) for rank in range(cp)}
    assert max(work) - min(work) == 0


def test_a_length_that_cannot_be_cut_is_refused_with_the_multiple() -> None:
    with pytest.raises(ValueError, match=r"sequence of 18 tokens .* 2 context-parallel ranks .* multiple of 4"):
        local_index(0, 2, 1, 18, "zigzag")
    with pytest.raises(ValueError, match="multiple of 4"):
        local_index(0, 4, 1, 18, "contiguous")
    with pytest.raises(ValueError, match="multiple of 4"):
        local_index(0, 4, 1, 0, "contiguous")
    assert len(local_index(0, 2, 1, 18, "contiguous")) == 9
    assert len(local_index(0, 1, 2, 17, "zigzag")) == 34  # one rank holds rows whole
    with pytest.raises(ValueError, match="order 'ring' does not exist; allowed: zigzag, contiguous"):
        local_index(0, 2, 1, 16, "ring")  # type: ignore[arg-type]


def test_ranges() -> None:
    assert ranges(np.array([3, 7, 0]), np.array([5, 7, 3])).tolist() == [3, 4, 0, 1, 2]
    assert ranges(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []
