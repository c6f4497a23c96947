"""Saves beside training: what was copied is what is written, however far training has gone on since."""

import errno
import shutil
import threading
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import pytest

from megatron_zebra.checkpoint import files
from megatron_zebra.checkpoint.mirror import Mirror
from megatron_zebra.checkpoint.reader import open_checkpoint
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.memory import saved_bytes
from megatron_zebra.planning.stages import Stages
from megatron_zebra.training import loop, saver
from megatron_zebra.training.console import Console
from tests.training.cases import opened, small
from tests.training.runs import Seen, curve, metrics, run

QUICK = {"model__num_layers": 2, "training__global_batch_size": 4, "training__steps": 6, "checkpoint__keep_last": 9}


def slow_disk(grid: Grid, folder: Path, overrides: dict[str, Any]) -> tuple[Seen, list[str]]:
    """The save of step 2 can write nothing before step 4 is done."""
    said: list[str] = []
    done = threading.Event()
    record, write, say = loop._Run._record, files.write, Console.say

    def after(self: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 4:
            done.set()
        return record(self, progress, *rest)

    def waiting(*args: Any) -> None:
        assert done.wait(20), "training waits for the disk"
        write(*args)

    def heard(self: Console, text: str) -> None:
        said.append(text)
        say(self, text)

    with (
        patch.object(loop._Run, "_record", after),
        patch.object(files, "write", waiting),
        patch.object(Console, "say", heard),
    ):
        return run(grid, folder, overrides), said


def contents_of(folder: Path, step: int) -> dict[tuple[str, str], bytes]:
    checkpoint = open_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    return {key: checkpoint.read(*key).tobytes() for key in checkpoint.tensors()}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_and_the_copy_is_of_its_step(run_distributed: Any, tmp_path: Path, stage: int) -> None:
    settings = QUICK | {"checkpoint__interval": 2, "optimizer__zero_stage": stage}
    run_distributed(run, 2, tmp_path / "blocking", settings | {"checkpoint__background": False})
    for seen, _ in run_distributed(slow_disk, 2, tmp_path / "beside", settings):
        assert seen.error is None
    for step in (2, 4, 6):
        assert contents_of(tmp_path / "beside", step) == contents_of(tmp_path / "blocking", step)
    assert curve(tmp_path / "beside") == curve(tmp_path / "blocking")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_planned_copy_is_what_a_rank_writes(run_distributed: Any, tmp_path: Path, stage: int) -> None:
    settings = QUICK | {"training__steps": 1, "optimizer__zero_stage": stage}
    run_distributed(run, 2, tmp_path, settings)
    config = small(**settings)
    arch, _ = opened(config)
    planned = saved_bytes(arch, config, 2, Stages.whole(arch.num_layers))
    for file in (tmp_path / "checkpoints" / "step-00000001").glob("*.bin"):
        assert file.stat().st_size == pytest.approx(planned, rel=0.15)  # whole tensors' ends, and alignment


def test_a_full_disk_is_told_once_the_save_beside_training_met_it(run_distributed: Any, tmp_path: Path) -> None:
    (outcome,) = run_distributed(no_room_at_first, 1, tmp_path, QUICK | {"checkpoint__interval": 2})
    seen, said = outcome
    assert seen.error is None
    assert [line for line in said if line.startswith("warning: step 2 was not saved: ")]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]


def test_a_server_that_is_away_for_a_while_does_not_end_the_run(run_distributed: Any, tmp_path: Path) -> None:
    outcomes = run_distributed(away_at_first, 2, tmp_path, QUICK | {"checkpoint__interval": 2})
    said = [line for _, lines in outcomes for line in lines]
    assert [seen.error for seen, _ in outcomes] == [None, None]
    assert [
        line for line in said if line.startswith("warning: step 2 was not saved: ") and "Input/output error" in line
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]


def away_at_first(grid: Grid, folder: Path, overrides: dict[str, Any]) -> tuple[Seen, list[str]]:
    said: list[str] = []
    write = files.write

    def failing(file: BinaryIO, data: Any) -> None:
        if "step-00000002" in file.name and grid.rank == 1:
            raise OSError(errno.EIO, "Input/output error")
        write(file, data)

    with patch.object(files, "write", failing), patch.object(Console, "say", lambda self, text: said.append(text)):
        return run(grid, folder, overrides), said


def no_room_at_first(grid: Grid, folder: Path, overrides: dict[str, Any]) -> tuple[Seen, list[str]]:
    said: list[str] = []
    free, calls = files.free_bytes, []

    def first_none(path: Path) -> int:
        calls.append(path)
        return 0 if len(calls) == 1 else free(path)

    with (
        patch.object(files, "free_bytes", first_none),
        patch.object(Console, "say", lambda self, text: said.append(text)),
    ):
        return run(grid, folder, overrides), said


def test_a_run_whose_folder_is_gone_goes_on_from_the_second_home(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"checkpoint__interval": 2, "checkpoint__mirror": f"file://{tmp_path}/away"}
    run_distributed(run, 2, tmp_path / "whole", settings | {"checkpoint__mirror": None})
    run_distributed(run, 2, tmp_path / "run", settings, 6)  # ends in step 6
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_distributed(run, 2, tmp_path / "run", settings)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[0] == "step-00000004"


def test_what_is_damaged_here_comes_from_the_second_home_and_what_is_there_from_an_older_one(
    run_distributed: Any, tmp_path: Path
) -> None:
    settings = QUICK | {"checkpoint__interval": 1, "checkpoint__mirror": f"file://{tmp_path}/away"}
    run_distributed(run, 2, tmp_path / "run", settings, 5)  # ends in step 5
    here, away = tmp_path / "run" / "checkpoints", tmp_path / "away"
    for file in (here / "step-00000004", here / "step-00000003", away / "step-00000004"):
        flip(file / "rank-00001.bin")
    (away / "step-00000004.1").mkdir()  # half-written: nobody asks for it
    outcomes = run_distributed(hearing, 2, tmp_path / "run", settings)
    seen, said = outcomes[0]
    assert seen.error is None
    text = "\n".join(said)
    assert "step-00000004 skipped" in text
    assert f"fetched step-00000004 from file://{away}" in text
    assert f"fetched step-00000003 from file://{away}" in text
    assert "at step 3" in text
    run_distributed(run, 2, tmp_path / "whole", settings | {"checkpoint__mirror": None})
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def test_a_second_home_out_of_reach_is_a_warning(run_distributed: Any, tmp_path: Path) -> None:
    (tmp_path / "away").write_text("a file stands in the way")
    settings = QUICK | {"checkpoint__interval": 2, "checkpoint__mirror": f"file://{tmp_path}/away/run"}
    (outcome,) = run_distributed(hearing, 1, tmp_path / "run", settings)
    seen, said = outcome
    assert seen.error is None
    assert len([line for line in said if line.startswith("saved ") and "warning: copying step-" in line]) == 3


def test_a_second_home_that_cannot_be_read_stops_only_who_has_nothing_else(
    run_distributed: Any, tmp_path: Path
) -> None:
    settings = QUICK | {"checkpoint__interval": 2, "checkpoint__mirror": f"file://{tmp_path}/away"}
    run_distributed(run, 1, tmp_path / "run", settings, 6)  # ends in step 6
    (outcome,) = run_distributed(without_network, 1, tmp_path / "run", settings)
    seen, said = outcome
    assert seen.error is None
    assert [line for line in said if "ConnectionError: no route; goes on from what is here" in line]
    assert len(metrics(tmp_path / "run")) == 6
    (outcome,) = run_distributed(without_network, 1, tmp_path / "new", settings)
    assert "ConnectionError: no route" in str(outcome[0].error)


def without_network(grid: Grid, folder: Path, overrides: dict[str, Any]) -> tuple[Seen, list[str]]:
    with patch.object(Mirror, "_entries", side_effect=ConnectionError("no route")):
        return hearing(grid, folder, overrides)


def test_a_save_that_a_failing_run_gives_up_is_told(run_distributed: Any, tmp_path: Path) -> None:
    (outcome,) = run_distributed(failing_in_a_save, 1, tmp_path, QUICK | {"checkpoint__interval": 2})
    assert [line for line in outcome[1] if line.startswith("warning: step 2 was not saved: not within 0.1 s")]


def failing_in_a_save(grid: Grid, folder: Path, overrides: dict[str, Any]) -> tuple[Seen, list[str]]:
    """The disk takes longer than a run waits that fails in step 4."""
    given_up = threading.Event()
    write = files.write

    def waiting(*args: Any) -> None:
        given_up.wait(20)
        write(*args)

    try:
        with patch.object(files, "write", waiting), patch.object(saver, "PATIENCE", 0.1):
            return hearing(grid, folder, overrides, 4)
    finally:
        given_up.set()


def hearing(grid: Grid, folder: Path, overrides: dict[str, Any], crash_at: int | None = None) -> tuple[Seen, list[str]]:
    said: list[str] = []
    with patch.object(Console, "say", lambda self, text: said.append(text)):
        return run(grid, folder, overrides, crash_at), said


def test_too_much_time_in_saves_is_warned_of_once(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"checkpoint__interval": 1, "checkpoint__background": False, "checkpoint__time_budget": 1e-6}
    (outcome,) = run_distributed(hearing, 1, tmp_path, settings)
    warned = [line for line in outcome[1] if "checkpoint.time_budget = 1e-06" in line]
    assert len(warned) == 1
    assert "checkpoint.interval = " in warned[0]
    assert all(record["save_time"] > 0 for record in metrics(tmp_path)[1:])
    (outcome,) = run_distributed(hearing, 1, tmp_path / "rich", settings | {"checkpoint__time_budget": 1.0})
    assert not [line for line in outcome[1] if "time_budget" in line]
