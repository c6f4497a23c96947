"""Nothing moves for long: one line says who waits where and who is not there, the logs have the stacks, and nobody is ended."""

import time
from pathlib import Path

import torch

from megatron_zebra.parallel.process import world
from megatron_zebra.parallel.watch import Pace
from megatron_zebra.training.run_folder import rank_log
from tests.processes import Ranks

LIMIT = 100.0


def rest(folder: Path, seconds: float, timeout: float) -> None:
    """Ranks in pairs; rank 3 does something else for a while before it meets rank 2 and then all others."""
    pace = Pace(beat=0.1, silence=5.0, still=1.0)
    with world("cpu", timeout, tp=2, pace=pace) as grid:
        rank_log(folder, grid.rank)
        for _ in range(2):
            grid.world.all_reduce(torch.zeros(1))
        for _ in range(30):  # moving all the time, for longer than ``still``
            grid.world.all_reduce(torch.zeros(1))
            time.sleep(0.05)
        if grid.rank == 3:
            time.sleep(seconds)
        grid.tp.all_reduce(torch.zeros(1))
        grid.world.all_reduce(torch.zeros(1))


def test_who_waits_and_who_is_not_there(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, rest, 4, tmp_path, 4.0, 600.0).wait(LIMIT)
    assert [end.code for end in ends] == [0] * 4
    lines = [
        line for end in ends for line in end.stderr.splitlines() if line.startswith("warning: no progress for 1 s: ")
    ]
    assert lines
    for line in lines:
        waits, absent = line.split("; not waiting there: ")
        assert "rank 2 in all-reduce of tp (ranks 2, 3)" in waits
        assert "rank 0, 1 in all-reduce of world (ranks 0, 1, 2, 3)" in waits
        assert absent.startswith("rank 3 (pp 0, dp 1, cp 0, tp 1) in no collective (")
    for rank in range(4):
        log = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "no progress for 1 s; all threads:" in log
        assert "test_standstill.py" in log
        assert ('File "' in log) == ("in rest" in log)


def test_a_rank_that_is_only_slow_says_nothing(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, rest, 4, tmp_path, 0.1, 600.0).wait(LIMIT)
    assert all("no progress" not in end.stderr for end in ends)


def test_the_end_by_timeout_names_who_was_not_there(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, rest, 4, tmp_path, 60.0, 5.0).wait(LIMIT)
    errors = [line for end in ends for line in end.errors]
    assert errors
    assert any("not waiting there: rank 3 (pp 0, dp 1, cp 0, tp 1) in no collective" in line for line in errors)
