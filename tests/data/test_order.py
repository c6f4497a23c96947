"""The order of the data: permutations, epochs, phases, blends, and the rows that come of them."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data.blend import PERIOD, Blend, period_counts
from megatron_zebra.data.concat import ConcatOrder, wrap
from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.permutation import Permutation, derive_key
from megatron_zebra.data.rows import IGNORE, OnePass
from megatron_zebra.errors import UserError
from tests.data.corpus import ListSource, check_row, patient

lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@patient
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    images = Permutation(size, key).array(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@patient
@given(st.integers(1, 2**61), st.integers(0, 2**64 - 1), st.data())
def test_one_image_alone_is_that_of_the_array(size: int, key: int, data: st.DataObject) -> None:
    permutation = Permutation(size, key)
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    images = permutation.array(np.array(indices)).tolist()
    assert images == [permutation(index) for index in indices]
    assert len(set(images)) == len(set(indices))
    assert all(0 <= image < size for image in images)


def test_permutations_are_spread_and_differ_by_key() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for key in range(2400):
        images = tuple(Permutation(4, derive_key(key)).array(np.arange(4)).tolist())
        seen[images] = seen.get(images, 0) + 1
    assert len(seen) == 24
    assert min(seen.values()) > 60  # 100 each are expected
    far = Permutation(10_000, 1).array(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), far)[0, 1]) < 0.05


def test_keys_do_not_run_together() -> None:
    assert (
        len({derive_key("a", 1), derive_key("a1"), derive_key("a", "1"), derive_key(1, "a"), derive_key("a", 1, 0)})
        == 5
    )
    assert derive_key("order", 1234, 0) == 13992805693094977792  # the order of every run so far rests on this


@patient
@given(st.integers(0, 500), st.integers(1, 200), st.integers(1, 60))
def test_wrap_is_a_repeated_stream(start: int, count: int, tokens: int) -> None:
    spans = wrap(start, start + count, tokens)
    assert [t for first, last in spans for t in range(first, last)] == [p % tokens for p in range(start, start + count)]


phases_of_one_source = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([4, 6, 8, 12, 24])), max_size=3).flatmap(
    lambda head: st.sampled_from([4, 8, 12, 24]).map(lambda last: [*head, (None, last)])
)


@patient
@given(st.integers(1, 400), phases_of_one_source, st.integers(0, 99))
def test_every_epoch_reads_every_token_once(tokens: int, phases: list[tuple[int | None, int]], key: int) -> None:
    """All positions of the repeated stream, counted over whole phases (rest of their last units too) and the last one."""
    order = ConcatOrder(tokens, phases, key)
    unit = np.lcm.reduce([length for _, length in phases])
    counts: dict[int, int] = {}
    units_used = 0
    for number, (rows, length) in enumerate(phases):
        per_unit = unit // length
        epochs = -(-units_used * unit // tokens) + 3
        units = -(-rows // per_unit) if rows is not None else -(-epochs * tokens // unit) - units_used
        for index in range(units * per_unit):
            spans = order.spans(number, index)
            assert sum(stop - start for start, stop in spans) == length
            for start, stop in spans:
                for token in range(start, stop):
                    counts[token] = counts.get(token, 0) + 1
        units_used += units
    # The units used are those that start in whole epochs; they may run a little into the next one.
    total = sum(counts.values())
    assert total == units_used * unit
    assert set(counts) == set(range(tokens))
    assert max(counts.values()) - min(counts.values()) <= 1 + unit // tokens


def test_a_schedule_whose_lengths_fit_no_epoch_is_refused() -> None:
    """Half of the tokens would be read several times in an epoch, and others never."""
    lengths = (Phase(16, 100), Phase(8, 251), Phase(None, 256))
    with pytest.raises(
        UserError, match=r"data\.sequence_schedule: the lengths 100, 251, 256 .*multiple 1,606,400, .*5,000"
    ):
        Dataset([ListSource([5000])], lengths, 1)
    Dataset([ListSource([5000])], lengths, 1, packing="best_fit")  # needs no common unit
    Dataset([ListSource([50])], [Phase(4, 64), Phase(None, 128)], 1)  # a row goes over an epoch's end


@patient
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.integers(3, 16), st.integers(0, 9))
def test_epochs_follow_each_other(lengths: list[int], length: int, seed: int) -> None:
    """Rows that start in epoch e all come before those of epoch e + 1, and hold each position of the stream once."""
    source = ListSource(lengths)
    dataset = Dataset([source], [Phase(None, length)], seed)
    total, index = source.tokens, 0
    for epoch in range(3):
        first, last = -(-epoch * total // length), -(-(epoch + 1) * total // length)
        expected = [[p % total for p in range(unit * length, (unit + 1) * length)] for unit in range(first, last)]
        rows = [dataset.read(index + n).tokens.tolist() for n in range(last - first)]
        assert sorted(rows) == sorted(expected)
        index += last - first


@patient
@given(lengths_of_documents, st.integers(2, 40), st.integers(0, 5))
def test_rows_against_the_brute_force_model(lengths: list[int], length: int, seed: int) -> None:
    source = ListSource(lengths)
    dataset = Dataset([source], [Phase(None, length)], seed)
    for index in range(12):
        check_row(dataset.read(index), source, length)
    across = Dataset([source], [Phase(None, length)], seed, attend_across_documents=True)
    for index in range(12):
        row = across.read(index)
        assert row.lengths.tolist() == [length]
        assert row.positions.tolist() == list(range(length))
        assert np.array_equal(row.labels, dataset.read(index).labels)


def test_L02_the_shift_comes_before_every_cut() -> None:
    """Ids 1..8 of one document in rows of 4: 7 targets in all, and that of the row's last token is in the next row."""
    source = ListSource([9])
    rows = [OnePass(source, 4).read(n) for n in range(3)]
    targets = [(t, y) for row in rows for t, y in zip(row.tokens.tolist(), row.labels.tolist()) if y != IGNORE]
    assert targets == [(t, t + 1) for t in range(8)]
    assert rows[0].labels.tolist() == [1, 2, 3, 4]


@patient
@given(lengths_of_documents, st.integers(2, 40), st.integers(1, 50))
def test_one_pass_reads_each_token_once(lengths: list[int], length: int, limit: int) -> None:
    source = ListSource(lengths)
    whole = OnePass(source, length)
    rows = [whole.read(index) for index in range(len(whole) + 2)]
    tokens = [t for row in rows for t in row.tokens[: length - row.padding].tolist()]
    assert tokens == list(range(source.tokens))
    assert rows[-1].padding == length
    assert (rows[-1].labels == IGNORE).all()
    for row in rows:
        check_row(row, source, length)
    few = OnePass(source, length, limit)
    starts = [int(few.read(index).tokens[0]) for index in range(len(few))]
    assert len(set(starts)) == len(few) == min(limit, len(whole))


def test_the_last_phase_reads_what_earlier_ones_did_not() -> None:
    source = ListSource([7, 100, 3, 250, 40])
    dataset = Dataset([source], [Phase(16, 4), Phase(8, 8), Phase(None, 16)], 3)
    parts = [range(0, 16), range(16, 24), range(24, 24 + (400 - 64 - 64) // 16)]
    tokens = [[t for row in part for t in dataset.read(row).tokens.tolist()] for part in parts]
    assert sorted(sum(tokens, [])) == list(range(400))  # noqa: RUF017
    assert [dataset.sequence_length(row) for row in (0, 15, 16, 23, 24)] == [4, 4, 8, 8, 16]


def test_an_earlier_phase_orders_its_rows_over_all_its_units() -> None:
    source = ListSource([4096])
    dataset = Dataset([source], [Phase(64, 8), Phase(None, 128)], 1)
    starts = [int(dataset.read(row).tokens[0]) for row in range(64)]
    assert len({start // 128 for start in starts[:8]}) > 2  # not the 16 rows of one unit after another


@patient
@given(st.lists(st.floats(0, 5), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.1))
def test_counts_of_a_period(weights: list[float]) -> None:
    counts = period_counts(weights)
    assert sum(counts) == PERIOD
    for weight, count in zip(weights, counts):
        assert (count == 0) == (weight == 0)
        assert abs(count - weight / sum(weights) * PERIOD) <= 1 or count == 1 or min(w for w in weights if w) < 0.01


def test_a_positive_weight_gets_a_row() -> None:
    assert period_counts([1e-9, 1, 0]) == [1, 9999, 0]
    assert sum(period_counts([1e-9] * 1000 + [1])) == PERIOD
    for wrong in ([], [-1.0, 2.0], [0.0, 0.0], [float("nan")], [float("inf"), 1.0], [1e308] * 3):
        with pytest.raises(UserError, match="weights"):
            period_counts(wrong)


@patient
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 99))
def test_a_blend_is_even_everywhere(weights: list[int], key: int) -> None:
    blend = Blend(weights, key)
    for first in (0, PERIOD - 300):
        before = blend.rows_before(first)
        places = [blend.locate(row) for row in range(first, first + 700)]
        sources = np.array([source for source, _ in places])
        for source, weight in enumerate(weights):
            indices = [index for number, index in places if number == source]
            assert indices == list(range(before[source], before[source] + len(indices)))  # each row once, in order
            so_far = before[source] + np.cumsum(sources == source)
            exact = weight / sum(weights) * np.arange(first + 1, first + 701)
            assert np.abs(so_far - exact).max() <= len(weights) + 3
            assert blend.rows_before(first + 333)[source] == so_far[332]


def test_sources_keep_their_places_over_phases() -> None:
    sources = [ListSource([400]), ListSource([800])]
    dataset = Dataset(sources, [Phase(30, 8), Phase(20, 8, weights=(0.0, 1.0)), Phase(None, 8)], 5, weights=[1, 1])
    read: list[list[int]] = [[], []]
    for row in range(90):
        place = dataset.locate(row)
        assert place.phase == (row >= 30) + (row >= 50)
        assert row not in range(30, 50) or place.source == 1
        got = dataset.read(row)
        assert got.source == place.source
        read[place.source] += got.tokens.tolist()
    assert all(len(tokens) == len(set(tokens)) for tokens in read)


def test_sources_of_equal_size_are_in_different_orders() -> None:
    dataset = Dataset([ListSource([400]), ListSource([400])], [Phase(None, 8)], 5)
    starts: list[list[int]] = [[], []]
    for row in range(60):
        got = dataset.read(row)
        starts[got.source].append(int(got.tokens[0]))
    assert starts[0][:20] != starts[1][:20]


@patient
@given(st.integers(0, 3), st.integers(0, 3))
def test_the_seed_decides(first: int, second: int) -> None:
    rows = [
        [Dataset([ListSource([999])], [Phase(None, 8)], seed).spans(n) for n in range(30)] for seed in (first, second)
    ]
    assert (rows[0] == rows[1]) == (first == second)


def test_R01_R02_the_order_does_not_depend_on_where_one_starts() -> None:
    """10 rows an epoch, 2 a step, 3 epochs: each later start, in epoch 2 too, sees the tail of the one sequence."""

    def rows_from(first: int) -> list[list[int]]:
        dataset = Dataset([ListSource([3, 5, 2] * 8)], [Phase(None, 8)], 7)  # rebuilt, as after a restart
        return [dataset.read(row).tokens.tolist() for row in range(first, 30)]

    whole = rows_from(0)
    for epoch in range(3):
        assert sorted(sum(whole[10 * epoch : 10 * epoch + 10], [])) == list(range(80))  # noqa: RUF017
    assert whole[:10] != whole[10:20] != whole[20:]
    for step in (3, 5, 7, 11, 13):
        assert rows_from(2 * step) == whole[2 * step :]


def test_the_last_phase_does_not_depend_on_how_far_one_reads() -> None:
    dataset = Dataset([ListSource([50, 60, 70])], [Phase(6, 4), Phase(None, 8)], 7)
    far = [dataset.spans(row) for row in range(200)]
    again = Dataset([ListSource([50, 60, 70])], [Phase(6, 4), Phase(None, 8)], 7)
    assert [again.spans(row) for row in reversed(range(200))][::-1] == far


def test_a_row_longer_than_the_corpus_goes_round() -> None:
    row = Dataset([ListSource([3, 2])], [Phase(None, 12)], 1).read(0)
    assert row.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert row.lengths.tolist() == [3, 2, 3, 2, 2]
    assert row.labels[-3:].tolist() == [IGNORE, 1, 2]


def test_bad_arguments() -> None:
    source = ListSource([50])
    with pytest.raises(UserError, match="no source"):
        Dataset([], [Phase(None, 8)], 1)
    with pytest.raises(UserError, match="2 weights for 1 sources"):
        Dataset([source], [Phase(None, 8)], 1, weights=[1, 2])
    for phases in ([], [Phase(3, 8)], [Phase(None, 8), Phase(None, 8)]):
        with pytest.raises(ValueError, match="last phase"):
            Dataset([source], phases, 1)
    with pytest.raises(IndexError):
        Dataset([source], [Phase(None, 8)], 1).read(-1)


def test_K07_reading_a_row_costs_its_tokens_only() -> None:
    source = ListSource([100_000] * 10)
    dataset = Dataset([source], [Phase(None, 1000)], 1)
    for row in islice(range(10**9, 10**9 + 50), 20):
        dataset.read(row)
    assert max(source.reads) <= 1001
    assert sum(source.reads) <= 20 * 1002
