"""Documents of certain lengths as a source of their own, and what a loss mask does to rows."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.config.check import problems
from megatron_zebra.config.load import load_config
from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.lengths import LengthFilter
from megatron_zebra.data.rows import IGNORE, OnePass
from megatron_zebra.data.source import FileSource, check_fits
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.errors import UserError
from megatron_zebra.training.inputs import Inputs, open_inputs
from tests.data.corpus import ListSource, check_row, patient

some_lengths = st.lists(st.integers(0, 12), min_size=1, max_size=30)


def masked(lengths: list[int], seed: int = 0) -> ListSource:
    return ListSource(lengths, np.random.default_rng(seed).random(sum(lengths)) < 0.5)


@patient
@given(some_lengths, st.integers(1, 12), st.integers(0, 12), st.data())
def test_a_filter_is_its_documents_one_after_another(lengths: list[int], low: int, more: int, data: Any) -> None:
    source = masked(lengths)
    bounds = source.document_bounds()
    kept = [range(a, b) for a, b in pairwise(bounds) if low <= b - a <= low + more]
    if not kept:
        with pytest.raises(UserError, match=rf"none of its {len(lengths)} documents has {low} to {low + more} tokens"):
            LengthFilter(source, low, low + more)
        return
    found = LengthFilter(source, low, low + more)
    tokens = [t for part in kept for t in part]
    assert (found.documents, found.tokens) == (len(kept), len(tokens))
    assert found.document_bounds().tolist() == np.cumsum([0, *map(len, kept)]).tolist()
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert found.read(start, stop).tolist() == tokens[start:stop]
    assert source.counted is not None
    assert found.read_mask(start, stop).tolist() == source.counted[tokens[start:stop]].tolist()
    inside = [b for b in found.document_bounds().tolist() if start < b <= stop]
    assert found.bounds(start, stop).tolist() == inside


def test_bounds_are_part_of_the_fingerprint_and_may_be_open() -> None:
    source = ListSource([3, 5, 0, 9])
    names = [LengthFilter(source, *limits).fingerprint for limits in ((4, None), (5, None), (None, 4), (4, 9))]
    assert len({*names, source.fingerprint}) == 5
    assert LengthFilter(source, 4, None).documents == 2
    assert LengthFilter(source, None, 5).documents == 2  # an empty document is none
    with pytest.raises(
        UserError, match="none of its 4 documents has at least 10 tokens; they have 0 to 9, half of them at most 4"
    ):
        LengthFilter(source, 10)
    with pytest.raises(IndexError):
        LengthFilter(source, 4).read(0, 15)


@patient
@given(some_lengths.filter(any), st.integers(2, 20), st.sampled_from(["concat", "best_fit"]), st.integers(0, 5))
def test_rows_of_filtered_and_masked_sources(lengths: list[int], length: int, packing: Any, seed: int) -> None:
    """Labels against the model that goes token by token: no target that the mask leaves out, none of another document."""
    source = masked(lengths, seed)
    dataset = Dataset([source], [Phase(None, length)], seed, packing=packing)
    for row in range(6):
        check_row(dataset.read(row), source, length)
    low = max(lengths) // 2 + 1
    dataset = Dataset([LengthFilter(source, low)], [Phase(None, length)], seed, packing=packing)
    for row in range(6):
        check_row(dataset.read(row), source, length)


@patient
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30), st.integers(16, 40), st.integers(1, 9))
def test_best_fit_never_cuts_what_fits(lengths: list[int], length: int, limit: int) -> None:
    """Every document of every row is whole, in training and in validation."""
    source = masked(lengths)
    check_fits(source, length)
    whole = {(int(a), int(b)) for a, b in pairwise(source.document_bounds())}
    dataset = Dataset([source], [Phase(None, length)], 1, packing="best_fit")
    valid = OnePass(source, length, whole_documents=True)
    rows = [valid.read(row) for row in range(len(valid))]
    assert sorted(t for row in rows for t in row.tokens[: length - row.padding].tolist()) == list(range(sum(lengths)))
    for row in [*rows, *(dataset.read(row) for row in range(8)), valid.read(len(valid))]:
        check_row(row, source, length)
        ends = np.cumsum(row.lengths)
        for start, end in zip(ends - row.lengths, ends):
            if start < length - row.padding:
                assert (int(row.tokens[start]), int(row.tokens[end - 1]) + 1) in whole
    few = OnePass(source, length, limit, whole_documents=True)
    assert len(few) == min(limit, len(valid))


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    source = masked([5, 9, 7])
    check_fits(source, 9)
    check_fits(ListSource([100]), 9)  # a text may be cut
    with pytest.raises(
        UserError, match=r"list: 2 of its 3 conversations are longer than a row of 6 tokens \(the longest has 9\)"
    ):
        check_fits(source, 6)
    check_fits(LengthFilter(source, None, 6), 6)


def pair(prefix: Path, lengths: list[int], chat: bool = False) -> str:
    """Ids below 101; in a chat every third token is said by the assistant."""
    tokens = np.arange(sum(lengths)) % 101
    with PairWriter(prefix, Vocabulary(101, 0, "", "", ""), masked=chat) as writer:
        writer.add(tokens, lengths, mask=(np.arange(tokens.size) % 3 == 2).astype(np.uint8) if chat else None)
        writer.finish()
    return str(prefix)


def inputs(sources: list[dict[str, Any]], **more: Any) -> Inputs:
    settings = {"data.train": sources, "data.sequence_length": 32, "data.packing": "best_fit", "data.split": [1, 0, 0]}
    return open_inputs(load_config(None, settings | {name.replace("__", "."): value for name, value in more.items()}))


def test_one_prefix_twice_with_more_of_its_long_documents(tmp_path: Path) -> None:
    lengths = [4, 30, 5, 29, 6, 28] * 10
    web = pair(tmp_path / "web", lengths)
    for packing in ("concat", "best_fit"):
        made = inputs(
            [{"prefix": web, "weight": 3, "min_document_tokens": 20}, {"prefix": web, "max_document_tokens": 19}],
            data__packing=packing,
        )
        assert made.source_names == ["web", "web-2"]
        rows = [made.train.read(row) for row in range(400)]
        assert 290 < sum(row.source == 0 for row in rows) < 310
        assert (
            all((row.lengths[: -1 if row.padding else None] >= 28).all() for row in rows if row.source == 0)
            or packing == "concat"
        )
        assert all((row.lengths[: -1 if row.padding else None] <= 6).all() for row in rows if row.source == 1)


def test_documents_are_split_before_they_are_filtered(tmp_path: Path) -> None:
    web = pair(tmp_path / "web", [4, 30] * 40)
    made = inputs([{"prefix": web, "min_document_tokens": 20}], data__split=[0.5, 0.5, 0.0])
    assert made.train.sources[0].documents == 20
    short = pair(tmp_path / "short", [30] * 40 + [4] * 40)
    made = inputs([{"prefix": short, "min_document_tokens": 20}], data__split=[0.5, 0.5, 0.0])
    assert made.valid == {}
    assert made.warnings[0].startswith("no validation of short, since its held-out share")
    with pytest.raises(UserError, match="web: none of its 80 documents has at least 31 tokens; they have 4 to 30"):
        inputs([{"prefix": web, "min_document_tokens": 31}])
    config = load_config(None, {"data.train": [{"prefix": "x", "min_document_tokens": 9, "max_document_tokens": 8}]})
    assert problems(config, 1) == ["data.train[0].min_document_tokens = 9: must not be above max_document_tokens = 8"]


def test_conversations_and_texts_in_one_blend(tmp_path: Path) -> None:
    chat, web = pair(tmp_path / "chat", [10, 20, 31] * 9, chat=True), pair(tmp_path / "web", [50] * 20)
    made = inputs([{"prefix": chat}, {"prefix": web}], data__split=[0.5, 0.5, 0])
    seen = set()
    for row in (made.train.read(number) for number in range(60)):
        seen.add(row.source)
        targets = row.labels[row.labels != IGNORE]
        if row.source == 0:
            assert 0 < targets.size < 16  # about a third
        else:
            assert targets.size >= 30 - row.padding
    assert seen == {0, 1}
    valid = made.valid["chat"].read(0)
    assert set(valid.lengths[: -1 if valid.padding else None]) <= {10, 20, 31}
    assert 0 < (valid.labels != IGNORE).sum() < 16
    assert made.warnings == []
    concat = inputs([{"prefix": chat}, {"prefix": web}], data__packing="concat")
    assert concat.warnings == [
        "chat: data.packing = concat cuts its conversations at row ends; best_fit keeps them whole"
    ]
    assert concat.train.read(0).labels.size == 32
    with pytest.raises(UserError, match="chat: 9 of its 27 conversations are longer than a row of 24 tokens"):
        inputs([{"prefix": chat}], data__sequence_schedule=[{"steps": 3, "sequence_length": 24}])
    inputs([{"prefix": chat, "max_document_tokens": 24}], data__sequence_length=24)


def test_K04_the_cache_of_packed_rows_knows_the_bounds(tmp_path: Path) -> None:
    source = FileSource(IndexedPair(pair(tmp_path / "p", [4, 30] * 9)))
    for filtered in (LengthFilter(source, 5), LengthFilter(source, None, 5), source):
        Dataset([filtered], [Phase(None, 32)], 1, packing="best_fit")
    assert len(list((tmp_path / "packing_cache").glob("*.rows"))) == 3
