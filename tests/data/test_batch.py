"""Batches: the same global batch under any layout, prepared ahead, and errors that come out where they belong."""

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data.batch import BatchLoader, MicroBatch, StepBatch, collate, read_step
from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.rows import IGNORE, OnePass
from megatron_zebra.data.source import FileSource
from megatron_zebra.data.synthetic import SyntheticSource
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.errors import UserError
from tests.data.corpus import ListSource, patient


def dataset(packing: str = "concat") -> Dataset:
    sources = [ListSource([3, 11, 40, 1, 25] * 6), ListSource([70, 5, 9] * 5)]
    return Dataset(sources, [Phase(16, 8), Phase(None, 16)], 3, weights=[2, 1], packing=packing)


def rows_of(batch: MicroBatch) -> list[tuple[list[int], ...]]:
    parts = (
        batch.tokens,
        batch.labels,
        batch.positions,
        torch.from_numpy(np.repeat(batch.sources, batch.sequence_length)),
    )
    return list(zip(*(part.view(batch.rows, -1).tolist() for part in parts)))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_layout_reads_the_same_global_batches(dp_size: int, micro_batch_size: int) -> None:
    reader = dataset()
    for step in range(4):
        expected = [reader.read(row) for row in range(8 * step, 8 * step + 8)]
        seen: list = [None] * 8
        for rank in range(dp_size):
            batch = read_step(reader, step, 8 * step, 8, micro_batch_size, rank, dp_size)
            assert batch.sequence_length == (8 if step < 2 else 16)
            rows = [row for micro in batch.micro_batches for row in rows_of(micro)]
            assert all(micro.rows == micro_batch_size for micro in batch.micro_batches)
            seen[rank::dp_size] = rows
        for (tokens, labels, positions, sources), row in zip(seen, expected):
            assert tokens == row.tokens.tolist()
            assert labels == row.labels.tolist()
            assert positions == row.positions.tolist()
            assert set(sources) == {row.source}


@patient
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(2, 30), st.integers(1, 4))
def test_a_micro_batch_is_its_rows_flattened(lengths: list[int], length: int, rows: int) -> None:
    reader = Dataset([ListSource(lengths)], [Phase(None, length)], 1)
    batch = collate([reader.read(row) for row in range(rows)])
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == np.int64
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == batch.tokens.numel() == rows * length
    assert set(range(0, rows * length + 1, length)) <= set(batch.cu_seqlens.tolist())  # row ends are segment ends
    for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
        assert batch.positions[start:stop].tolist() == list(range(stop - start))
    assert batch.here("cpu").targets == sum(int((reader.read(row).labels != IGNORE).sum()) for row in range(rows))


def test_R01_R02_a_loader_that_starts_anywhere_goes_on_the_same() -> None:
    def ramp(step: int) -> int:
        return 4 if step < 4 else 8

    def rows_from(step: int, consumed: int) -> list[tuple[int, int, list]]:
        with BatchLoader(dataset(), ramp, 2, step=step, consumed_rows=consumed, stop=30) as loader:
            return [(b.step, b.consumed_rows, [rows_of(m) for m in b.micro_batches]) for b in loader]

    whole = rows_from(0, 0)
    assert [step for step, _, _ in whole] == list(range(30))
    for first in (1, 3, 4, 5, 17, 29):
        assert rows_from(first, whole[first][1]) == whole[first:]


def test_an_error_comes_out_where_the_batch_would_have() -> None:
    class Broken(Dataset):
        def read(self, row: int):
            if row >= 20:
                raise UserError(f"row {row}")
            return super().read(row)

    loader = BatchLoader(Broken([ListSource([99])], [Phase(None, 8)], 1), 4, 1)
    assert [next(loader).step for _ in range(5)] == list(range(5))
    with pytest.raises(UserError, match="row 20"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_threads_end() -> None:
    before = threading.active_count()
    for take in (0, 1, 5):
        loader = BatchLoader(dataset(), 4, 1)
        for _ in range(take):
            assert isinstance(next(loader), StepBatch)
        loader.close()
        loader.close()
        assert list(loader) == []
    assert threading.active_count() == before


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match=r"global batch of 6 rows at step 0 .* multiple of 4 is needed"):
        next(BatchLoader(dataset(), 6, 2, dp_size=2))
    with pytest.raises(ValueError, match="two phases"):
        next(BatchLoader(dataset(), 32, 1))


def test_evaluation_reads_each_token_once_on_any_number_of_ranks() -> None:
    source = ListSource([10, 3, 25])
    for ranks, micro in ((1, 1), (2, 1), (2, 2), (3, 1)):
        seen: list[int] = []
        for rank in range(ranks):
            with BatchLoader(
                OnePass(source, 8), 2 * ranks * micro, micro, dp_rank=rank, dp_size=ranks, stop=5
            ) as loader:
                for batch in loader:
                    for part in batch.micro_batches:
                        seen += part.labels[part.labels != IGNORE].tolist()
        assert sorted(seen) == [t for t in range(38) if t not in (0, 10, 13)]


def test_K07_a_batch_of_long_rows_costs_its_tokens_only(tmp_path: Path) -> None:
    """S = 131072: peak memory of reading a micro-batch from files, in int64 arrays of S (S x S would be 131072 of them)."""
    length = 131_072
    vocabulary = Vocabulary(1000, 0, "", "", "")
    with PairWriter(tmp_path / "p", vocabulary) as writer:
        writer.add(np.arange(4 * length) % 1000, np.full(1024, length // 256))
        writer.finish()
    for packing in ("concat", "best_fit"):
        reader = Dataset([FileSource(IndexedPair(tmp_path / "p"))], [Phase(None, length)], 1, packing=packing)
        read_step(reader, 0, 0, 1, 1)
        tracemalloc.start()
        batch = read_step(reader, 1, 1, 1, 1).micro_batches[0]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * 8 * length
        assert batch.cu_seqlens.size >= 256
        total = sum(part.numel() for part in (batch.tokens, batch.labels, batch.positions))
        assert total + batch.cu_seqlens.size + batch.sources.size < 4 * length


@patient
@given(st.integers(1, 30), st.integers(2, 60), st.integers(2, 40), st.integers(0, 5), st.data())
def test_synthetic_documents(documents: int, mean: int, vocabulary: int, seed: int, data: st.DataObject) -> None:
    source = SyntheticSource(documents, mean, vocabulary, seed)
    whole = source.read(0, source.tokens)
    start = data.draw(st.integers(0, source.tokens))
    stop = data.draw(st.integers(start, source.tokens))
    assert np.array_equal(SyntheticSource(documents, mean, vocabulary, seed).read(start, stop), whole[start:stop])
    ends = np.flatnonzero(whole == 0) + 1  # the end-of-document token is nowhere else
    assert np.array_equal(ends, source.bounds(0, source.tokens))
    assert np.array_equal(ends, source.document_bounds()[1:])
    assert whole.max() < vocabulary
    half = documents // 2
    if half:
        last = SyntheticSource(documents, mean, vocabulary, seed, part=range(half, documents))
        assert np.array_equal(last.read(0, last.tokens), whole[source.tokens - last.tokens :])


def test_synthetic_documents_are_ragged_and_can_be_learnt() -> None:
    source = SyntheticSource(1000, 300, 512, 1)
    lengths = np.diff(source.document_bounds())
    assert (lengths < 37).any()
    assert (lengths > 384).any()
    assert 250 < lengths.mean() < 350
    tokens = source.read(0, source.tokens)
    pairs = np.unique(tokens[:-1] * 512 + tokens[1:], return_counts=True)[1] / tokens.size
    singles = np.unique(tokens, return_counts=True)[1] / tokens.size
    bigram = -(pairs * np.log(pairs)).sum() + (singles * np.log(singles)).sum()
    assert bigram < 0.5 * -(singles * np.log(singles)).sum()  # the next token is far more certain after the last one
