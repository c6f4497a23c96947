"""A stage that fails ends the run in one line on the others; torch's print of its whole schedule is nobody's concern."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_zebra.data.batch import read_step
from megatron_zebra.parallel.process import world
from megatron_zebra.parallel.watch import Pace
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import build_training
from megatron_zebra.training.step import train_step
from tests.processes import Ranks
from tests.training.cases import opened, small


def fail_in_the_second_stage(schedule: str) -> None:
    with world("cpu", 60.0, pp=2, pace=Pace(beat=0.1)) as grid:
        config = small(parallel__pp=2, parallel__pp_schedule=schedule)
        arch, inputs = opened(config)
        trained: Any = build_training(config, arch, grid)
        batch = read_step(inputs.train, 0, 0, 8, 1)
        part = trained.runner.parts[1].decoder if grid.rank == 1 else None
        if part is not None:
            with patch.object(part, "forward", side_effect=ArithmeticError("a layer is broken")):
                train_step(trained, batch.micro_batches, 1e-3, grid, 1, StepFlops(arch))
        train_step(trained, batch.micro_batches, 1e-3, grid, 1, StepFlops(arch))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_a_stage_that_fails_is_one_line(tmp_path: Path, schedule: str) -> None:
    waiting, failed = Ranks(tmp_path, fail_in_the_second_stage, 2, schedule).wait(60)
    [line] = waiting.errors
    assert line.startswith("error: rank 1 (pp 1, dp 0, cp 0, tp 0) has failed: ArithmeticError: a layer is broken")
    assert "pipeline over pp (ranks 0, 1)" in line
    assert waiting.stderr.strip() == line
    assert failed.stderr.count("ArithmeticError: a layer is broken") == 1  # its own traceback, once
    assert "torch.distributed.pipelining" not in failed.stderr
    assert "chedule:" not in failed.stderr
    assert "time_step" not in failed.stderr
