"""The second home: what goes up comes down the same, index last, old ones leave; what is wrong is one line on all ranks."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_zebra.checkpoint import Alone, catalog, layout
from megatron_zebra.checkpoint.errors import CheckpointError
from megatron_zebra.checkpoint.mirror import Mirror
from megatron_zebra.checkpoint.verify import find_latest_good
from megatron_zebra.errors import UserError
from tests.checkpoint.cases import ThreadRank, content_of, run_ranks, save_step, saved

WORLD = 3


def up(root: Path, url: str, step: int, **keep: int) -> list[Any]:
    folder = saved(save_step(root, step, WORLD)).folder
    rule = {"keep_last": 2, "keep_every": 0} | keep
    return run_ranks(WORLD, lambda group: Mirror(url).upload(folder, group, **rule))


def down(root: Path, url: str, ranks: int = 2) -> list[Any]:
    """On each rank the name of the newest checkpoint that is newer than any here, which is fetched; None without one."""

    def act(group: ThreadRank) -> str | None:
        here, mirror = find_latest_good(root, group), Mirror(url)
        names = mirror.newer(-1 if here.step is None else here.step, group)
        return mirror.fetch(names[0], root, group).name if names else None

    return run_ranks(ranks, act)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_went_up_comes_down(tmp_path: Path, kind: str) -> None:
    url = f"{kind}://{tmp_path}/away"
    for step in (1, 2, 3, 4):
        assert up(tmp_path / "run", url, step, keep_every=3) == [None] * WORLD
    assert [entry.step for entry in Mirror(url)._entries()] == [3, 4]
    up(tmp_path / "run", url, 5, keep_every=3)
    assert [entry.step for entry in Mirror(url)._entries()] == [3, 4, 5]  # 3 for ever, two others
    assert down(tmp_path / "run", url) == [None, None]  # it has step 5 itself
    assert down(tmp_path / "new", url) == ["step-00000005"] * 2
    found = find_latest_good(tmp_path / "new")
    assert found.folder is not None
    assert content_of(found.folder) == 5


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    assert down(tmp_path / "run", f"file://{tmp_path}/away") == [None, None]


def test_without_its_index_it_is_not_there(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away"
    up(tmp_path / "run", url, 1)
    up(tmp_path / "run", url, 2)
    (tmp_path / "away" / "step-00000002" / layout.INDEX).unlink()
    assert down(tmp_path / "new", url) == ["step-00000001"] * 2
    up(tmp_path / "run", url, 3, keep_last=1)
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["step-00000003"]


def test_a_piece_that_is_missing_up_there_is_named_and_leaves_nothing_half(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away"
    up(tmp_path / "run", url, 1)
    (tmp_path / "away" / "step-00000001" / "rank-00001.bin").unlink()
    outcomes = down(tmp_path / "new", url)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert "fetching step-00000001 from file://" in str(outcomes[0])
    assert "rank-00001.bin" in str(outcomes[0]) + str(outcomes[1])
    assert catalog.newest(tmp_path / "new") is None


def test_an_altered_piece_is_found_by_its_checksum(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away"
    up(tmp_path / "run", url, 1)
    file = tmp_path / "away" / "step-00000001" / "rank-00001.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    down(tmp_path / "new", url)
    found = find_latest_good(tmp_path / "new")
    assert (found.folder, found.rejected) == (None, 1)


def test_a_fault_of_one_rank_is_told_by_all_and_the_index_stays_away(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away"
    folder = saved(save_step(tmp_path / "run", 1, WORLD)).folder

    def act(group: ThreadRank) -> None:
        mirror = Mirror(url)
        if group.rank == 1:
            with patch.object(mirror.fs.__class__, "put_file", side_effect=ConnectionError("no route")):
                mirror.upload(folder, group, 2, 0)
        else:
            mirror.upload(folder, group, 2, 0)

    outcomes = run_ranks(WORLD, act)
    assert all("ConnectionError: no route" in str(outcome) for outcome in outcomes)
    assert down(tmp_path / "new", url) == [None, None]


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "s3://bucket/run"])
def test_an_address_that_nobody_serves_is_one_line(url: str) -> None:
    with patch.dict("sys.modules", {"s3fs": None}), pytest.raises(CheckpointError, match=url) as caught:
        Mirror(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/more", "link"])
def test_what_holds_the_runs_own_checkpoints_is_no_second_home(tmp_path: Path, below: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    for url in (str(tmp_path / below), f"file://{tmp_path / below}"):
        with pytest.raises(UserError, match="holds the run's own checkpoints, or lies within them; give another place"):
            Mirror(url).apart_from(tmp_path / "checkpoints")


def test_memory_is_no_second_home_and_a_place_beside_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory://x: ends with the process"):
        Mirror("memory://x").apart_from(tmp_path / "checkpoints")
    Mirror(str(tmp_path / "checkpoints-2")).apart_from(tmp_path / "checkpoints")


def test_a_home_that_connects_at_once_and_cannot_is_told_where_it_is_used(tmp_path: Path) -> None:
    away = Mirror(f"zip://{tmp_path / 'none.zip'}")
    away.apart_from(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="looking for checkpoints in zip://"):
        away.newer(-1, Alone())
    for problem in up(tmp_path / "checkpoints", f"zip://{tmp_path / 'none.zip'}", 1):
        assert "copying step-00000001 to zip://" in str(problem)


def test_a_lost_folder_comes_back_whole(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/away"
    up(tmp_path / "run", url, 7)
    shutil.rmtree(tmp_path / "run")
    assert down(tmp_path / "run", url, 4) == ["step-00000007"] * 4
    assert content_of(tmp_path / "run" / "step-00000007") == 7


def test_what_was_just_copied_stays_though_there_are_later_ones(tmp_path: Path) -> None:
    """A run that went back behind a damaged checkpoint, whose copy is there yet."""
    url = f"file://{tmp_path}/away"
    up(tmp_path / "run", url, 9, keep_last=1)
    up(tmp_path / "back", url, 5, keep_last=1)
    assert [entry.step for entry in Mirror(url)._entries()] == [5, 9]
    up(tmp_path / "back", url, 10, keep_last=1)
    assert [entry.step for entry in Mirror(url)._entries()] == [10]
