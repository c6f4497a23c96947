"""Ranks that take longer for their own work than the middle of all are named, with their seconds a step."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.pipeline.runner import WholeModel
from megatron_zebra.training.console import Console
from megatron_zebra.training.slow import SlowRanks
from tests.training.runs import run


def test_the_slow_are_named_and_the_sums_begin_anew() -> None:
    slow = SlowRanks(lambda rank: f"rank {rank}")
    assert slow.report() is None
    for _ in range(4):
        slow.add([1.0, 1.2, 3.0, 0.8])
    assert slow.report() == "slow: rank 2: 3 s; own work in a step, 1.1 s in the middle of all ranks"
    slow.add([1.0, 1.2, 1.6, 0.8])
    assert slow.report() is None
    slow.add([1.0] * 20 + [9.0 + i for i in range(6)])
    line = slow.report()
    assert line is not None
    assert line.startswith("slow: rank 25: 14 s, rank 24: 13 s, rank 23: 12 s, rank 22: 11 s and 2 more; ")


def delayed(grid: Grid, folder: Path, overrides: dict[str, Any]) -> list[str]:
    said: list[str] = []
    train = WholeModel.train

    def late(self: Any, *args: Any) -> Any:
        time.sleep(0.3 if grid.rank == 2 else 0.0)
        return train(self, *args)

    with patch.object(WholeModel, "train", late), patch.object(Console, "say", lambda self, text: said.append(text)):
        run(grid, folder, overrides)
    return said


def test_a_rank_that_holds_the_others_up_is_told(run_distributed: Any, tmp_path: Path) -> None:
    settings = {"model__num_layers": 2, "training__global_batch_size": 2, "training__steps": 4, "logging__interval": 2}
    # Rank 3 has the other half of each layer and waits for it in forward, ranks 0 and 1 in the step.
    said = run_distributed(delayed, 4, tmp_path, settings | {"parallel__tp": 2}, tp=2)[0]
    told = [line for line in said if line.startswith("slow: ")]
    assert told
    assert not any("rank 3" in line for line in told)
    assert all(line.startswith("slow: rank 2 (pp 0, dp 1, cp 0, tp 0): 0.") for line in told)
