"""Geometry and coverage against enumeration of every element."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.checkpoint.coverage import check_cover, tensor_defect
from megatron_zebra.checkpoint.errors import IncompleteCheckpoint
from megatron_zebra.checkpoint.pieces import PieceKey, copies, runs

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def keys(draw, shape):
    lo = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, lo))
    start = draw(st.integers(0, prod(size)))
    return PieceKey("t", "weight", shape, lo, size, start, draw(st.integers(0, prod(size) - start)))


def elements(key):
    """Flat global indices of a piece's elements, in its order."""
    every = np.arange(prod(key.global_shape)).reshape(key.global_shape)
    box = every[tuple(slice(o, o + n) for o, n in zip(key.offsets, key.local_shape))]
    return box.reshape(-1)[key.flat_start : key.flat_start + key.flat_numel]


@given(shapes.flatmap(keys))
@settings(deadline=None)
def test_runs_are_the_interval_in_order(key):
    every = np.arange(prod(key.global_shape)).reshape(key.global_shape or (1,))
    parts = [every[tuple(map(slice, run.lo, run.hi))].reshape(-1) for run in runs(key)]
    np.testing.assert_array_equal(np.concatenate([*parts, np.empty(0, int)]), elements(key))
    assert len(parts) <= max(1, 2 * len(key.global_shape) - 1)


@given(shapes.flatmap(lambda shape: st.tuples(keys(shape), keys(shape))))
@settings(max_examples=150, deadline=None)
def test_copies_bring_exactly_the_common_elements(pair):
    source, target = pair
    theirs, out = elements(source), np.full(target.flat_numel, -1)
    for copy in copies(source, target):
        for index in np.ndindex(copy.extent):
            s = np.ravel_multi_index(np.add(index, copy.source_lo), copy.source_shape) + copy.source_at
            t = np.ravel_multi_index(np.add(index, copy.target_lo), copy.target_shape) + copy.target_at
            assert copy.source_span[0] <= s < copy.source_span[1]
            assert copy.target_span[0] <= t < copy.target_span[1]
            assert out[t] == -1
            out[t] = theirs[s]
    wanted = elements(target)
    np.testing.assert_array_equal(out, np.where(np.isin(wanted, theirs), wanted, -1))


@given(shapes.flatmap(lambda shape: st.lists(keys(shape), min_size=1, max_size=6)))
@settings(max_examples=150, deadline=None)
def test_cover_agrees_with_counting(pieces):
    counts = np.zeros(prod(pieces[0].global_shape), int)
    for piece in pieces:
        counts[elements(piece)] += 1
    assert (tensor_defect(pieces) is None) == bool((counts == 1).all())


@st.composite
def tilings(draw):
    """A grid of boxes, each cut into intervals: covers everything once."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    cuts = [sorted({0, n, *draw(st.sets(st.integers(0, n), max_size=2))}) for n in shape]
    pieces = []
    for cell in np.ndindex(*(len(c) - 1 for c in cuts)):
        lo = tuple(c[i] for c, i in zip(cuts, cell))
        size = tuple(c[i + 1] - c[i] for c, i in zip(cuts, cell))
        edges = sorted({0, prod(size), *draw(st.sets(st.integers(0, prod(size)), max_size=2))})
        pieces += [PieceKey("t", "w", shape, lo, size, a, b - a) for a, b in pairwise(edges)]
    return draw(st.permutations(pieces))


@given(tilings(), st.data())
@settings(deadline=None)
def test_a_tiling_covers_and_any_piece_lost_or_doubled_is_found(pieces, data):
    assert tensor_defect(pieces) is None
    victim = data.draw(st.integers(0, len(pieces) - 1))
    lost = pieces[:victim] + pieces[victim + 1 :]
    if lost:
        assert "missing" in tensor_defect(lost)
    assert tensor_defect([*pieces, pieces[victim]]) is not None


def test_defects_name_tensor_and_interval():
    def part(start, numel, name="layers.0.norm.weight"):
        return PieceKey(name, "exp_avg", (4, 5), (0, 0), (4, 5), start, numel)

    with pytest.raises(IncompleteCheckpoint, match=r"layers.0.norm.weight \(exp_avg\): elements \[7, 9\) are missing"):
        check_cover([part(9, 11), part(0, 7)])
    with pytest.raises(IncompleteCheckpoint, match=r"elements \[5, 7\) were written more than once"):
        check_cover([part(0, 7), part(5, 15)])
    with pytest.raises(IncompleteCheckpoint, match=r"elements \[18, 20\) are missing"):
        check_cover([part(0, 18)])
    whole = part(0, 20)
    check_cover([whole], {(whole.name, "exp_avg"): (4, 5)})
    with pytest.raises(IncompleteCheckpoint, match=r"other \(weight\): no rank wrote it"):
        check_cover([whole], {(whole.name, "exp_avg"): (4, 5), ("other", "weight"): (3,)})
    with pytest.raises(IncompleteCheckpoint, match=r"shape \[4, 5\], expected \[5, 4\]"):
        check_cover([whole], {(whole.name, "exp_avg"): (5, 4)})
    with pytest.raises(IncompleteCheckpoint, match="the model has no such tensor"):
        check_cover([whole, part(0, 20, "stray")], {(whole.name, "exp_avg"): (4, 5)})
    column = PieceKey("w", "weight", (4, 6), (0, 0), (4, 3), 0, 12)
    with pytest.raises(IncompleteCheckpoint, match=r"indices \[0, 3\] to \[4, 6\] .* are missing"):
        check_cover([column])


def test_cover_of_many_ranks_is_quick():
    """4096 owners of one tensor cut over tp 8: no pairwise comparison, no array of elements."""
    shape, parts = (2**20, 2**14), 512
    pieces = []
    for rank in range(8):
        box = (2**20, 2**11)
        size = prod(box) // parts
        pieces += [PieceKey("w", "weight", shape, (0, rank * 2**11), box, i * size, size) for i in range(parts)]
    assert tensor_defect(pieces) is None
    assert "missing" in tensor_defect(pieces[:-1])
