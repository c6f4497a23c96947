"""Which checkpoints there are and which go; disks that are full; readers and removers at the same time."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_zebra.checkpoint import (
    CheckpointError,
    DiskFull,
    NotTaken,
    catalog,
    files,
    find_latest_good,
    layout,
    newest,
    preflight,
    prune,
    retire_newer,
)
from megatron_zebra.errors import UserError
from tests.checkpoint.cases import content_of, run_ranks, save_step, saved
from tests.checkpoint.crash import crashing


def names(root):
    return [entry.folder.name for entry in catalog.entries(root)]


def steps(root):
    return [entry.step for entry in catalog.entries(root)]


def test_keep_last_and_keep_every(tmp_path):
    for step in range(1, 11):
        result = saved(save_step(tmp_path, step, keep_last=2, keep_every=4))
    assert steps(tmp_path) == [4, 8, 9, 10]
    assert result.removed == ["step-00000007"] or result.removed == []
    assert newest(tmp_path) == tmp_path / "step-00000010"


def test_the_one_resumed_from_and_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        saved(save_step(tmp_path, step))
    assert prune(tmp_path, 1, protect=[tmp_path / "step-00000001"]) == ["step-00000002"]
    assert prune(tmp_path, 0) == ["step-00000001"]
    assert steps(tmp_path) == [3]
    assert find_latest_good(tmp_path).step == 3


def test_remains_of_unfinished_saves_go_but_other_files_stay(tmp_path):
    for step in (1, 2, 3):
        saved(save_step(tmp_path, step))
    (tmp_path / "step-00000002" / layout.INDEX).unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000004").write_text("a file of that name")
    assert prune(tmp_path, 5) == ["step-00000002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "notes",
        "step-00000001",
        "step-00000003",
        "step-00000004",
    ]


def test_a_step_saved_again_replaces_the_first_without_a_moment_between(tmp_path):
    saved(save_step(tmp_path, 1))
    saved(save_step(tmp_path, 2))
    for content, folder in ((50, "step-00000002.1"), (51, "step-00000002.2")):
        result = saved(save_step(tmp_path, 2, content=content))
        assert result.folder.name == folder
        assert names(tmp_path) == ["step-00000001", folder]
        assert content_of(find_latest_good(tmp_path).folder) == content
    (tmp_path / "step-00000002.2" / "rank-00000.bin").unlink()  # a damaged one is replaced too
    assert saved(save_step(tmp_path, 2, content=52)).removed == ["step-00000002.2"]
    assert content_of(find_latest_good(tmp_path).folder) == 52


def test_going_on_from_an_older_step_takes_the_newer_out_of_the_line(tmp_path):
    for step in (1, 2, 3):
        saved(save_step(tmp_path, step))
    assert saved(save_step(tmp_path, 1, content=9)).newer == ["step-00000002", "step-00000003"]
    assert retire_newer(tmp_path, 1) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000001.1\n"
    found = find_latest_good(tmp_path)
    assert found.step == 1
    assert all("set aside" in line for line in found.skipped)
    result = saved(save_step(tmp_path, 2, content=10, keep_last=3))
    assert steps(tmp_path) == [1, 2, 3]  # step 3's stays until the run gets there again
    assert (result.newer, content_of(find_latest_good(tmp_path).folder)) == ([], 10)
    assert retire_newer(tmp_path, 2) == []
    saved(save_step(tmp_path, 4, keep_last=3))
    assert steps(tmp_path) == [1, 2, 4]


def test_an_older_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    saved(save_step(tmp_path, 1))

    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(catalog, "remove_checkpoint", refuse)
    result = saved(save_step(tmp_path, 2, keep_last=1))
    assert str(result).endswith(f"; warning: {tmp_path / 'step-00000001'}: Permission denied; older checkpoints stay")
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_what_a_save_without_room_left_undone_is_done_before_the_next(tmp_path, monkeypatch, keep_last):
    """Without room for ``latest``, a few bytes, the older ones stay too; the next save must not find their room missing."""
    for step in range(1, keep_last + 1):
        saved(save_step(tmp_path, step, keep_last=keep_last))

    def refuse(root, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(root))

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "write_latest", refuse)
        results = save_step(tmp_path, keep_last + 1, keep_last=keep_last)
        assert all(isinstance(result, DiskFull) for result in results)
    assert steps(tmp_path) == list(range(1, keep_last + 2))  # it has its index, but nothing went
    there = []
    monkeypatch.setattr(
        sys.modules["megatron_zebra.checkpoint.save"], "preflight", lambda root, needed: there.append(steps(root))
    )
    saved(save_step(tmp_path, keep_last + 2, keep_last=keep_last))
    assert there == [list(range(2, keep_last + 2))]
    assert steps(tmp_path) == list(range(3, keep_last + 3))
    assert (tmp_path / "latest").read_text() == f"{catalog.folder_name(keep_last + 2)}\n"


def test_latest_is_a_hint(tmp_path):
    for step in (1, 2):
        saved(save_step(tmp_path, step))
    for text in ("step-00000001\n", "nonsense", ""):
        (tmp_path / "latest").write_text(text)
        assert find_latest_good(tmp_path).step == 2
    (tmp_path / "latest").unlink()
    assert find_latest_good(tmp_path).step == 2


def test_removal_takes_the_index_first_and_makes_that_durable(tmp_path):
    for step in (1, 2):
        saved(save_step(tmp_path, step))
    with crashing(None) as crash:
        prune(tmp_path, 1)
    assert crash.log[:2] == ["remove index.json", "sync_folder step-00000001"]
    assert crash.log[-1] == "remove_folder step-00000001"


def test_removed_by_two_at_once(tmp_path):
    for step in (1, 2, 3, 4):
        saved(save_step(tmp_path, step))
    results = run_ranks(4, lambda group: prune(tmp_path, 1))
    assert not any(isinstance(result, BaseException) for result in results)
    assert steps(tmp_path) == [4]


def test_readers_beside_a_run_that_saves_and_prunes(tmp_path):
    """A reader gets a whole checkpoint or an error of ours, never wrong values."""
    saved(save_step(tmp_path, 1))
    stop, failures, reads = threading.Event(), [], [0]

    def watch():
        while not stop.is_set():
            try:
                content_of(newest(tmp_path))
                reads[0] += 1
            except CheckpointError:
                pass
            except BaseException as error:
                failures.append(error)
                return

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for step in range(2, 16):
        saved(save_step(tmp_path, step, keep_last=1))
    stop.set()
    for watcher in watchers:
        watcher.join()
    assert not failures
    assert reads[0] > 0


def fill(monkeypatch, after, code=errno.ENOSPC, only=None):
    """The disk takes ``after`` more writes."""
    real, left, lock = files.write, [after], threading.Lock()

    def write(file, data):
        with lock:
            if only is None or only in file.name:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(code, "No space left on device")
        real(file, data)

    monkeypatch.setattr(files, "write", write)


@pytest.mark.parametrize("after", range(0, 30, 3))
def test_a_full_disk_keeps_the_older_checkpoint_and_leaves_nothing(tmp_path, monkeypatch, after):
    saved(save_step(tmp_path, 1))
    with monkeypatch.context() as patch:
        fill(patch, after)
        results = save_step(tmp_path, 2, keep_last=1)
    assert all(isinstance(result, DiskFull) and isinstance(result, UserError) for result in results)
    assert "No space left" in str(results[0])
    assert str(tmp_path) in str(results[0])
    assert "bytes free" in str(results[0])
    assert "\n" not in str(results[0])
    assert content_of(find_latest_good(tmp_path).folder) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert saved(save_step(tmp_path, 2, keep_last=1)).removed == ["step-00000001"]


def test_one_rank_without_room_or_with_any_error_stops_all(tmp_path, monkeypatch):
    saved(save_step(tmp_path, 1))
    for code, kind in ((errno.EDQUOT, DiskFull), (errno.EIO, NotTaken), (errno.EACCES, CheckpointError)):
        with monkeypatch.context() as patch:
            fill(patch, 2, code, only="rank-00001")
            results = save_step(tmp_path, 2, world_size=3)
        assert [type(result) for result in results] == [kind] * 3
        assert str(results[0]).startswith("rank 1: ")
        assert names(tmp_path) == ["step-00000001"]


def stale(name):
    def call(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle", name)

    return call


def test_storage_that_is_away_is_told_as_that_wherever_a_save_meets_it(tmp_path, monkeypatch):
    """The listing after ``latest``, a look at what was written, and the clearing up after a failed write."""
    for number, (where, name) in enumerate([(catalog, "write_latest"), (Path, "read_bytes"), (files, "entries")], 2):
        saved(save_step(tmp_path, 1))
        with monkeypatch.context() as patch:
            if name == "entries":
                fill(patch, 2, errno.EIO)
                patch.setattr(files, "remove_tree", stale("x"))
            else:
                patch.setattr(where, name, stale("x"))
            results = save_step(tmp_path, number, world_size=2)
        assert [type(result) for result in results] == [NotTaken] * 2
        saved(save_step(tmp_path, number, keep_last=1))
        assert content_of(find_latest_good(tmp_path).folder) == number
        assert len(names(tmp_path)) == 1


def test_preflight(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    preflight(tmp_path, 1000)
    with pytest.raises(DiskFull, match="needs 1,001 bytes, 1,000 are free"):
        preflight(tmp_path, 1001)
    results = save_step(tmp_path, 1, expected_bytes=501)
    assert all(isinstance(result, DiskFull) for result in results)
    assert names(tmp_path) == []


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    results = save_step(tmp_path / "file" / "checkpoints", 1)
    assert all(isinstance(r, CheckpointError) and str(tmp_path / "file") in str(r) for r in results)


LIMITED = """
import resource, sys
sys.path[:0] = [sys.argv[1]]
from tests.checkpoint.cases import save_step
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
for result in save_step(Path(sys.argv[2]), 1):
    print(type(result).__name__, result)
print(sorted(p.name for p in Path(sys.argv[2]).iterdir()))
"""


def test_a_limit_of_the_system_itself(tmp_path):
    """The kernel refuses the write (a file size limit), not a test double."""
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[2]), str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["DiskFull", "DiskFull", "[]"], done.stdout + done.stderr
