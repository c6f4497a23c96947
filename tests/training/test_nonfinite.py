"""N03: a gradient that is not a number on one rank is skipped by all ranks together, and leaves no trace."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import metrics, run

QUICK = {"model__num_layers": 2, "training__global_batch_size": 4, "training__steps": 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_N03_all_ranks_skip_together(run_distributed: Any, tmp_path: Path, stage: int, precision: str) -> None:
    overrides = QUICK | {"optimizer__zero_stage": stage, "training__precision": precision}
    for seen in run_distributed(run, 2, tmp_path, overrides, None, [2]):
        assert seen.error is None
        assert seen.applied == [True, False, True, True]
        assert seen.unchanged == [False, True, False, False]
        assert not math.isfinite(seen.norms[1])
        assert math.isfinite(sum(seen.norms[2:]))
        assert seen.updates == 3
    records = metrics(tmp_path)
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert records[1]["grad_norm"] is None
    assert all(record["loss"] > 0 for record in records)


@pytest.mark.parametrize("stage", [0, 3])
def test_N03_a_run_that_only_skips_stops(run_distributed: Any, tmp_path: Path, stage: int) -> None:
    overrides = QUICK | {"optimizer__zero_stage": stage, "training__max_nonfinite_steps": 2}
    for seen in run_distributed(run, 2, tmp_path, overrides, None, [2, 3]):
        assert seen.error is not None
        assert seen.error.startswith("the loss or the gradient was not finite 2 steps in a row")
        assert "\n" not in seen.error
        assert seen.applied == [True, False, False]
    assert len(metrics(tmp_path)) == 3
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_N03_skips_that_are_not_in_a_row_do_not_stop(run_distributed: Any, tmp_path: Path) -> None:
    overrides = QUICK | {"training__max_nonfinite_steps": 2}
    (seen,) = run_distributed(run, 1, tmp_path, overrides, None, [1, 3])
    assert seen.error is None
    assert seen.applied == [False, True, False, True]
