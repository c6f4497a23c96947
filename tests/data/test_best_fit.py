"""Best-fit packing: the algorithm, the order of packed rows, and the cache that many processes share."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data import pack_cache
from megatron_zebra.data.batch import read_step
from megatron_zebra.data.best_fit import BestFitOrder
from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.pack_cache import load_or_build
from megatron_zebra.data.packing import RowTable, best_fit_decreasing, pack
from megatron_zebra.errors import UserError
from tests.data.corpus import ListSource, check_row, patient


def free_room_one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as in a textbook: the room left in each bin."""
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [place for place, room in enumerate(bins) if room >= size]
        if not fitting:
            bins.append(capacity)
            fitting = [len(bins) - 1]
        bins[min(fitting, key=bins.__getitem__)] -= size
    return sorted(bins)


@patient
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_packing_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    bins = best_fit_decreasing(np.array(sizes, np.int64), capacity)
    filled = np.bincount(bins, weights=np.array(sizes, np.int64)).astype(int)
    assert sorted((capacity - filled).tolist()) == free_room_one_by_one(sizes, capacity)


@patient
@given(st.lists(st.integers(0, 50), min_size=1, max_size=50), st.integers(1, 25))
def test_documents_are_cut_only_when_longer_than_a_row(lengths: list[int], capacity: int) -> None:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = pack(bounds[:-1], np.diff(bounds), capacity)
    read: list[int] = []
    for row in range(table.rows):
        spans = table.spans(row)
        assert 0 < sum(stop - start for start, stop in spans) <= capacity
        assert spans == sorted(spans)
        for start, stop in spans:
            read += range(start, stop)
            document = int(np.searchsorted(bounds, start, "right")) - 1
            assert stop <= bounds[document + 1]
            if lengths[document] <= capacity:
                assert (start, stop) == (bounds[document], bounds[document + 1])
            else:  # pieces of a row each, and what is over
                assert (start - bounds[document]) % capacity == 0
                assert stop - start == capacity or stop == bounds[document + 1]
    assert sorted(read) == list(range(sum(lengths)))
    assert (table.tokens, table.documents) == (sum(lengths), len(lengths))


def test_packing_wastes_little_and_is_quick() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6, 1.2, 200_000)).astype(np.int64)
    start = time.process_time()
    table = pack(np.cumsum(lengths) - lengths, lengths, 2048)
    assert time.process_time() - start < 5
    assert table.tokens / (table.rows * 2048) > 0.999


@patient
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(2, 30), st.integers(0, 5))
def test_an_epoch_reads_every_token_once(lengths: list[int], length: int, seed: int) -> None:
    source = ListSource(lengths)
    dataset = Dataset([source], [Phase(None, length)], seed, packing="best_fit")
    rows = pack(source.document_bounds()[:-1], np.array(lengths), length).rows
    epochs = []
    for epoch in range(2):
        read = [dataset.read(row) for row in range(epoch * rows, (epoch + 1) * rows)]
        for row in read:
            check_row(row, source, length)
        tokens = [t for row in read for t in row.tokens[: length - row.padding].tolist()]
        assert sorted(tokens) == list(range(source.tokens))
        epochs.append(tokens)
    if rows > 8:
        assert epochs[0] != epochs[1]


@patient
@given(
    st.lists(st.integers(1, 40), min_size=4, max_size=40),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([8, 16, 24])), min_size=1, max_size=3),
    st.integers(0, 5),
)
def test_phases_read_documents_that_earlier_ones_did_not(
    lengths: list[int], head: list[tuple[int, int]], seed: int
) -> None:
    """Over all packed rows of the phases and one more epoch, each token is read as often as any other, to one."""
    source = ListSource(lengths)
    order = BestFitOrder(source, [*head, (None, 32)], seed, None)
    counts = np.zeros(source.tokens, np.int64)
    for phase, (rows, length) in enumerate([*head, (None, 32)]):
        packed = order._edges[phase][-1]
        assert rows is None or packed >= rows
        seen = [span for index in range(packed) for span in order.spans(phase, index)]
        for start, stop in seen:
            assert stop - start <= length
            counts[start:stop] += 1
        assert counts.max() - counts.min() <= 1
    assert counts.min() == counts.max()  # the last phase's sections end with an epoch
    for start, stop in [
        span for index in range(packed, packed + order._sections[-1][-1].rows) for span in order.spans(phase, index)
    ]:
        counts[start:stop] += 1
    assert counts.min() == counts.max()


def test_a_phase_of_several_epochs() -> None:
    order = BestFitOrder(ListSource([10] * 4), [(13, 10), (2, 20), (None, 40)], 1, None)
    starts = [order.spans(0, index)[0][0] for index in range(13)]
    for epoch in range(3):
        assert sorted(starts[4 * epoch : 4 * epoch + 4]) == [0, 10, 20, 30]
    rest = [span for index in range(2) for span in order.spans(1, index)]
    assert len({starts[12], *(start for start, _ in rest)}) == 4  # 1 + 3 documents, and a fourth begins the next epoch


def test_K04_packing_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """One file, whatever dp and micro-batch size; it is built once and used again; another S is another file."""

    def batches(ranks: int, micro: int) -> list[list[int]]:
        source = ListSource([5, 9, 3, 12, 7, 30, 2, 8] * 4)
        data = Dataset([source], [Phase(None, 16)], 3, packing="best_fit", cache_dir=tmp_path)
        seen: list = [None] * 8
        for rank in range(ranks):
            parts = read_step(data, 0, 0, 8, micro, rank, ranks).micro_batches
            seen[rank::ranks] = [row for part in parts for row in part.tokens.view(part.rows, -1).tolist()]
        return seen

    first = batches(1, 1)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.rows")}
    assert len(files) == 1
    for ranks, micro in ((1, 4), (2, 2), (4, 1), (8, 1)):
        assert batches(ranks, micro) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.rows")} == files
    Dataset([ListSource([5, 9])], [Phase(None, 16)], 3, packing="best_fit", cache_dir=tmp_path)
    Dataset([ListSource([5, 9, 3, 12, 7, 30, 2, 8] * 4)], [Phase(None, 8)], 3, packing="best_fit", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.rows"))) == 3


def table() -> RowTable:
    return pack(np.array([0, 5, 9]), np.array([5, 4, 3]), 8)


def _race(barrier, folder: Path, rounds: int, results) -> None:
    inodes = []
    try:
        for number in range(rounds):
            barrier.wait(60)
            path = folder / f"{number}" / "deep" / "x.rows"
            got = load_or_build(path, table)
            assert got.spans(0) == table().spans(0)
            assert got.rows == 2
            inodes.append(path.stat().st_ino)
        results.put(inodes)
    except BaseException as error:
        results.put(repr(error))


def test_D02_eight_processes_build_the_same_cache_fifty_times(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    workers = [context.Process(target=_race, args=(barrier, tmp_path, 50, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [f for f in found if isinstance(f, str)] == []
    assert all(f == found[0] for f in found)  # the file that one saw was never replaced
    assert list(tmp_path.rglob("*.tmp")) == []


def test_D02_without_locks_and_links_the_first_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows neither: every process builds, none fails, no finished file is replaced by another content."""

    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(pack_cache.fcntl, "flock", refuse)
    assert load_or_build(tmp_path / "a.rows", table).rows == 2
    before = (tmp_path / "a.rows").stat().st_ino
    pack_cache._write(tmp_path / "a.rows", table(), alone=False)
    assert (tmp_path / "a.rows").stat().st_ino == before
    monkeypatch.setattr(pack_cache.os, "link", refuse)
    assert load_or_build(tmp_path / "b.rows", table).rows == 2
    pack_cache._write(tmp_path / "a.rows", table(), alone=False)
    assert (tmp_path / "a.rows").stat().st_ino == before
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".lock", ".rows", ".rows"]


def test_D01_each_node_builds_its_own_and_a_shared_one_is_built_once(tmp_path: Path) -> None:
    builds: list[Path] = []

    def node(folder: Path) -> None:
        def build() -> RowTable:
            builds.append(folder)
            time.sleep(0.1)
            return table()

        assert load_or_build(folder / "x.rows", build).rows == 2

    threads = [threading.Thread(target=node, args=(tmp_path / name,)) for name in ("a", "b", "shared", "shared")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in builds) == ["a", "b", "shared"]


def test_D01_a_waiter_sees_a_file_that_comes_late_or_gives_up_with_a_message(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    holding, release = threading.Event(), threading.Event()

    def slow() -> RowTable:
        holding.set()
        release.wait(30)
        return table()

    builder = threading.Thread(target=load_or_build, args=(path, slow))
    builder.start()
    holding.wait(30)
    with pytest.raises(UserError, match=r"x\.rows: waited .* s for another process to pack the documents"):
        load_or_build(path, table, timeout=0.2)
    timer = threading.Timer(0.2, release.set)
    timer.start()
    assert load_or_build(path, lambda: pytest.fail("built twice"), timeout=30).rows == 2
    builder.join()


def test_D01_a_killed_builder_hands_over(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"

    def die() -> RowTable:
        (tmp_path / "x.rows.tmp").write_bytes(b"half")
        os._exit(9)

    child = multiprocessing.get_context("fork").Process(target=load_or_build, args=(path, die))
    child.start()
    child.join()
    assert load_or_build(path, table, timeout=5).rows == 2
    assert not (tmp_path / "x.rows.tmp").exists()


def test_a_damaged_or_unwritable_cache(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    load_or_build(path, table)
    whole = path.read_bytes()
    for data, message in ((b"", "cannot be read"), (b"x" * 99, "not an index"), (whole[:-1], "bytes instead of")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            load_or_build(path, table)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"set data\.cache_dir"):
        load_or_build(tmp_path / "file" / "x.rows", table)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_cache.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        load_or_build(tmp_path / "x.rows", table)
    assert [path.name for path in tmp_path.iterdir()] == ["x.rows.lock"]
