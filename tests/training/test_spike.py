"""A loss far above what is usual: its update is left out, or the run goes back and leaves the data out; nothing else changes."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_zebra.config.check import problems
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.training import loop
from megatron_zebra.training import step as step_module
from megatron_zebra.training.console import Console
from megatron_zebra.training.spike import Usual
from tests.training.cases import small
from tests.training.runs import Seen, curve, metrics, run

QUICK = {
    "model__num_layers": 2,
    "training__global_batch_size": 4,
    "training__steps": 8,
    "training__spike__threshold": 20.0,
    "training__spike__window": 3,
}


def test_mean_and_deviation_are_those_of_the_steps_so_far() -> None:
    losses = [4.0, 3.5, 3.75, 3.0, 3.25]
    usual = Usual()
    for loss in losses:
        usual = usual.after(loss, window=len(losses))
    assert usual.mean == pytest.approx(statistics.mean(losses))
    assert usual.variance == pytest.approx(statistics.pvariance(losses))
    above = usual.mean + 3 * usual.variance**0.5
    assert usual.deviations(above, 5) == pytest.approx(3)
    assert usual.deviations(above, 6) == 0  # too few steps are known
    assert usual.deviations(0.0, 5) == 0
    assert usual.after(float("nan"), 5) == usual.after(float("inf"), 5) == usual
    for _ in range(200):
        usual = usual.after(1.0, window=5)
    assert usual.mean == pytest.approx(1.0)  # what is long ago is forgotten


def spiking(
    grid: Grid, folder: Path, overrides: dict[str, Any], rows: list[int], crash_at: int | None = None, begin: int = 0
) -> tuple[Seen, list[str]]:
    """A run in which the loss of each step that begins with one of ``rows`` is told tenfold.

    Args:
        begin: rows to have been consumed when a checkpoint was restored, in place of what it says.
    """
    said: list[str] = []
    place = [0]
    following, add, start = loop.BatchLoader.__next__, step_module._add_by_source, loop.start

    def noted(self: Any) -> Any:
        batch = following(self)
        place[0] = batch.consumed_rows
        return batch

    def tenfold(losses: Any, counts: Any, batch: Any, token_losses: Any) -> None:
        add(losses, counts, batch, token_losses * (10 if place[0] in rows else 1))

    def elsewhere(*args: Any) -> Any:
        progress, notes = start(*args)
        return (replace(progress, consumed_rows=begin) if begin and progress.step else progress), notes

    with (
        patch.object(loop.BatchLoader, "__next__", noted),
        patch.object(step_module, "_add_by_source", tenfold),
        patch.object(loop, "start", elsewhere),
        patch.object(Console, "say", lambda self, text: said.append(text)),
    ):
        return run(grid, folder, overrides, crash_at), said


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_a_skipped_spike_leaves_no_trace(run_distributed: Any, tmp_path: Path, stage: int, precision: str) -> None:
    settings = QUICK | {"optimizer__zero_stage": stage, "training__precision": precision}
    for seen, said in run_distributed(spiking, 2, tmp_path, settings, [16]):
        assert seen.error is None
        assert seen.applied == [step != 4 for step in range(8)]
        assert seen.unchanged == [step == 4 for step in range(8)]
        assert seen.updates == 7
        assert [line for line in said if line.startswith("loss spike at step 5: ") and line.endswith("is left out")]
    records = metrics(tmp_path)
    assert [record["skipped_steps"] for record in records] == [0] * 4 + [1] * 4
    assert records[4]["loss"] > 5 * records[3]["loss"]
    assert records[4]["grad_norm"] < 5  # the true one is told


def test_a_tp_and_pp_grid_decides_as_one(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"parallel__tp": 2, "parallel__pp": 2}
    for seen, _ in run_distributed(spiking, 4, tmp_path, settings, [16], tp=2, pp=2):
        assert seen.applied == [step != 4 for step in range(8)]


def test_what_is_usual_is_resumed(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"checkpoint__interval": 2}
    run_distributed(spiking, 1, tmp_path / "whole", settings, [16])
    run_distributed(spiking, 1, tmp_path / "resumed", settings, [16], 4)
    run_distributed(spiking, 1, tmp_path / "resumed", settings, [16])
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    assert metrics(tmp_path / "resumed")[-1]["skipped_steps"] == 1


def test_back_to_the_checkpoint_and_past_the_data(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"checkpoint__interval": 2, "checkpoint__keep_last": 9}
    rewinding = settings | {"training__spike__action": "rewind"}
    outcomes = run_distributed(spiking, 2, tmp_path / "rewound", rewinding, [20])
    for seen, said in outcomes:
        assert seen.error is None
        assert [line for line in said if line.startswith("loss spike at step 6: ") and "back to" in line]
        assert "rows 16 to 24 are left out" in said
    run_distributed(spiking, 2, tmp_path / "reference", settings, [], 5)
    run_distributed(spiking, 2, tmp_path / "reference", settings, [], None, 24)
    assert curve(tmp_path / "rewound") == curve(tmp_path / "reference")
    assert [record["consumed_rows"] for record in metrics(tmp_path / "rewound")] == [4, 8, 12, 16, 28, 32, 36, 40]


def test_a_spike_that_comes_back_with_any_data_stops_the_run(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"checkpoint__interval": 4, "training__spike__action": "rewind"}
    (outcome,) = run_distributed(spiking, 1, tmp_path, settings, list(range(16, 100, 4)))
    assert outcome[0].error is not None
    assert outcome[0].error.startswith("the loss was a spike each time after 3 returns to step 4")


def test_without_a_checkpoint_there_is_no_way_back(run_distributed: Any, tmp_path: Path) -> None:
    (outcome,) = run_distributed(spiking, 1, tmp_path, QUICK | {"training__spike__action": "rewind"}, [16])
    assert outcome[0].error is None
    assert [line for line in outcome[1] if "there is no checkpoint yet; its update is left out" in line]


def test_a_loss_that_stays_high_stops_the_run_in_its_own_words(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"training__max_nonfinite_steps": 2}
    (outcome,) = run_distributed(spiking, 1, tmp_path, settings, [16, 20])
    assert outcome[0].error is not None
    assert outcome[0].error.startswith(
        "the loss or the gradient was a spike (training.spike.threshold) 2 steps in a row"
    )


def test_phases_of_length_cannot_be_rewound() -> None:
    schedule = {"data__sequence_schedule": [{"steps": 2, "sequence_length": 16}]}
    config = small(**QUICK | schedule | {"training__spike__action": "rewind"})
    assert [line for line in problems(config, 1) if line.startswith("training.spike.action = rewind: ")]
    assert not problems(small(**QUICK | schedule), 1)
