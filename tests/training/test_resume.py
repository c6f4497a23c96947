"""A stopped run goes on as if it had not stopped; what stands in the way is said, and nothing is lost in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_zebra.checkpoint.catalog import newest
from tests.training.runs import contents, curve, metrics, run

QUICK = {
    "model__num_layers": 2,
    "training__global_batch_size": 4,
    "training__steps": 7,
    "checkpoint__interval": 2,
    "data__synthetic__documents": 30,  # ten rows an epoch: the run crosses into the second and third
}


def uninterrupted_and_resumed(
    run_distributed: Any, tmp_path: Path, world_size: int, overrides: dict[str, Any], crash_at: int = 6
) -> tuple[list[Any], list[Any]]:
    """The curves of one whole run, and of one that ended in the middle of ``crash_at`` and was begun again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_distributed(run, world_size, whole, overrides)
    run_distributed(run, world_size, resumed, overrides, crash_at)
    assert len(metrics(resumed)) == crash_at - 1
    run_distributed(run, world_size, resumed, overrides)
    return curve(whole), curve(resumed)


@pytest.mark.parametrize(
    ("stage", "world_size", "precision", "micro_batch_size"),
    [
        (0, 1, "fp32", 2),
        (0, 2, "bf16", 1),
        (1, 1, "bf16", 2),
        (1, 2, "fp32", 1),
        (2, 1, "fp32", 4),
        (2, 2, "bf16", 1),
        (3, 1, "bf16", 2),
        (3, 2, "fp32", 1),
    ],
)
def test_R01_R02_a_resumed_run_is_the_whole_run_bit_for_bit(
    run_distributed: Any, tmp_path: Path, stage: int, world_size: int, precision: str, micro_batch_size: int
) -> None:
    overrides = QUICK | {
        "optimizer__zero_stage": stage,
        "training__precision": precision,
        "training__micro_batch_size": micro_batch_size,
        "evaluation__interval": 3,
        "evaluation__rows": 3,
    }
    whole, resumed = uninterrupted_and_resumed(run_distributed, tmp_path, world_size, overrides)
    assert len(whole) == 7
    assert resumed == whole
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_skipped_step_is_remembered_over_a_resume(run_distributed: Any, tmp_path: Path) -> None:
    """AdamW's count, the counter and the data go on past a step that was not applied."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_distributed(run, 1, whole, QUICK, None, [2])
    run_distributed(run, 1, resumed, QUICK, 6, [2])
    run_distributed(run, 1, resumed, QUICK)
    assert curve(resumed) == curve(whole)
    assert metrics(resumed)[-1]["skipped_steps"] == 1
    assert contents(resumed)[0]["updates"] == 6


@pytest.mark.parametrize(("before", "after"), [((1, 2), (3, 1)), ((3, 2), (0, 1)), ((0, 1), (2, 2)), ((1, 1), (3, 2))])
def test_R08_another_layout_keeps_weights_and_moments(
    run_distributed: Any, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(stage, processes) at the save and after it. The state read and saved again is the same, bit for bit."""
    whole, changed, again = (tmp_path / name for name in ("whole", "changed", "again"))
    base = QUICK | {"optimizer__decay_steps": 7}
    run_distributed(run, before[1], whole, base | {"optimizer__zero_stage": before[0]})
    run_distributed(run, before[1], changed, base | {"optimizer__zero_stage": before[0]}, 6)
    saved = contents(changed)
    new = base | {"optimizer__zero_stage": after[0]}
    # A run begun from it that skips its only step saves what it read.
    load = {"checkpoint__load": str(changed), "training__steps": 5}
    run_distributed(run, after[1], again, new | load, None, [1])
    progress, tensors = contents(again)
    assert tensors == saved[1]
    assert progress["updates"] == saved[0]["updates"] == 4
    run_distributed(run, after[1], changed, new)
    for got, want in zip(metrics(changed), metrics(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_R04_weights_alone_begin_a_new_schedule_and_optimizer(run_distributed: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run_distributed(run, 1, old, QUICK)
    load = {"checkpoint__load": str(old), "checkpoint__load_part": "weights"}
    run_distributed(run, 1, new, QUICK | load)
    first, *_, last = metrics(new)
    assert [first["step"], last["step"]] == [1, 7]
    assert first["learning_rate"] == pytest.approx(1e-2 / 3)  # the first of two warm-up steps
    assert first["consumed_rows"] == 4
    assert first["loss"] < metrics(old)[0]["loss"] - 0.3  # the weights are the trained ones
    assert contents(new)[0]["updates"] == 7
    # The same weights with all else fresh: another load of them does the same.
    run_distributed(run, 1, tmp_path / "twin", QUICK | load)
    assert curve(tmp_path / "twin") == curve(new)


def test_a_loaded_run_goes_on_with_the_schedule_or_restarts_it(run_distributed: Any, tmp_path: Path) -> None:
    old = tmp_path / "old"
    run_distributed(run, 1, old, QUICK | {"training__steps": 4, "optimizer__decay_steps": 8})
    rates = {}
    for how in ("continue", "restart"):
        load = {"checkpoint__load": str(old), "checkpoint__schedule": how, "training__steps": 8}
        run_distributed(run, 1, tmp_path / how, QUICK | load, 8 - 4)
        run_distributed(run, 1, tmp_path / how, QUICK | load)  # a resume does not restart it once more
        rates[how] = [record["learning_rate"] for record in metrics(tmp_path / how)]
        assert [record["step"] for record in metrics(tmp_path / how)] == [5, 6, 7, 8]
        assert metrics(tmp_path / how)[0]["consumed_rows"] == 5 * 4  # the data goes on either way
    run_distributed(run, 1, tmp_path / "whole", QUICK | {"training__steps": 8})
    assert rates["continue"] == [record["learning_rate"] for record in metrics(tmp_path / "whole")[4:]]
    warm_up = [1e-2 / 3, 2e-2 / 3, 1e-2]
    assert rates["restart"][:3] == pytest.approx(warm_up)


def test_a_start_that_is_refused_leaves_the_configuration_that_ran(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    before = (tmp_path / "config.yaml").read_text()
    (seen,) = run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 4, "model__ffn_hidden_size": 40})
    assert seen.error is not None
    assert "another model" in seen.error
    assert (tmp_path / "config.yaml").read_text() == before
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 4})
    assert "steps: 4" in (tmp_path / "config.yaml").read_text()


def test_metrics_of_a_run_whose_checkpoints_are_gone_are_kept(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 3})
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2]
    (kept,) = tmp_path.glob("metrics.until-*.jsonl")
    assert kept.read_text() == before


def test_another_order_of_rows_is_said(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 3})
    assert "another order now" not in log(tmp_path)
    half = {"data__sequence_length": 24}
    run_distributed(run, 1, tmp_path, QUICK | half | {"training__steps": 4})
    assert "sequence lengths 24 (before: sequence lengths 48): training rows have another order now" in log(tmp_path)
    run_distributed(run, 1, tmp_path, QUICK | half | {"training__steps": 5})
    assert log(tmp_path).count("another order now") == 1
    assert [record["consumed_rows"] for record in metrics(tmp_path)] == [4, 8, 12, 16, 20]


def test_other_data_is_read_from_its_beginning_and_it_is_said(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 4, "training__seed": 4})
    assert [record["consumed_rows"] for record in metrics(tmp_path)] == [4, 8, 4, 8]
    assert "the training data or training.seed is another than before" in log(tmp_path)
    # With what follows, the rows go on.
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 5, "training__seed": 4})
    assert metrics(tmp_path)[-1]["consumed_rows"] == 12


def test_metrics_are_cut_back_to_the_restored_step(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"data__split": [0.8, 0.2, 0.0], "evaluation__interval": 1, "evaluation__rows": 2}
    run_distributed(run, 1, tmp_path, settings, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0')  # as a crash leaves it
    run_distributed(run, 1, tmp_path, settings)
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 8))
    lines = (tmp_path / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 8))


def test_a_run_killed_before_its_first_save_begins_anew(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK, 2)
    run_distributed(run, 1, tmp_path, QUICK)
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 8))


def test_latest_and_the_policy_of_keeping(run_distributed: Any, tmp_path: Path) -> None:
    keep = {"checkpoint__interval": 1, "checkpoint__keep_last": 2, "checkpoint__keep_every": 3}
    run_distributed(run, 1, tmp_path, QUICK | keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000003", "step-00000006", "step-00000007"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000007"


def test_a_finished_run_has_nothing_to_do(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (seen,) = run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2})
    assert (seen.error, seen.applied) == (None, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused_by_the_key(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 2, tmp_path, QUICK | {"training__steps": 2})
    for seen in run_distributed(run, 2, tmp_path, QUICK | {"model__window_size": 8}):
        assert seen.error is not None
        assert seen.error.endswith("is of another model: window_size: 7 in the checkpoint, 8 wanted")
    load = {"checkpoint__load": str(tmp_path), "model__hidden_size": 48}
    (seen,) = run_distributed(run, 1, tmp_path / "new", QUICK | load)
    assert seen.error == f"model.hidden_size = 48: must be 32, as the model of checkpoint.load = {tmp_path} has"
    load = {"checkpoint__load": str(tmp_path), "model__window_size": 8}
    (seen,) = run_distributed(run, 1, tmp_path / "new", QUICK | load)
    assert seen.error.startswith("window_size: 8, the loaded model has 7: a run that changes it begins with ")
    (seen,) = run_distributed(run, 1, tmp_path / "new", QUICK | load | {"checkpoint__load_part": "weights"})
    assert seen.error is None
    assert "window_size: 8, the loaded model has 7" in log(tmp_path / "new")


def log(folder: Path) -> str:
    """What the main rank noted."""
    return (folder / "logs" / "rank-00000.log").read_text()


def damage(folder: Path) -> None:
    """Turn one bit in the middle of a checkpoint's data."""
    file = next(folder.glob("*.bin"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run_distributed: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_distributed(run, 2, whole, QUICK)
    shutil.copytree(whole, tmp_path / "hurt")
    place = newest(tmp_path / "hurt" / "checkpoints")
    assert place is not None
    damage(place)
    for seen in run_distributed(run, 2, tmp_path / "hurt", QUICK):
        assert len(seen.applied) == 1  # from step 6 on
    assert "step-00000007 skipped: " in log(tmp_path / "hurt")
    assert f"resumed {tmp_path / 'hurt'} at step 6" in log(tmp_path / "hurt")
    assert curve(tmp_path / "hurt") == curve(whole)
    assert contents(tmp_path / "hurt") == contents(whole)


def test_when_all_are_damaged_the_run_is_not_begun_anew(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 2, tmp_path, QUICK | {"training__steps": 3})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for place in (tmp_path / "checkpoints").glob("step-*"):
        damage(place)
    for seen in run_distributed(run, 2, tmp_path, QUICK):
        assert seen.error is not None
        assert "every checkpoint is damaged" in seen.error
        assert "\n" not in seen.error
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_load_of_nothing_is_refused(run_distributed: Any, tmp_path: Path) -> None:
    (seen,) = run_distributed(run, 1, tmp_path / "run", QUICK | {"checkpoint__load": str(tmp_path / "no")})
    assert seen.error.startswith(f"checkpoint.load = {tmp_path / 'no'}: holds no model; allowed are ")


def test_the_state_in_a_checkpoint_is_fp32(run_distributed: Any, tmp_path: Path) -> None:
    """bf16 weights are derived: the masters have bits that bf16 has not."""
    run_distributed(run, 1, tmp_path, QUICK | {"training__steps": 2, "training__precision": "bf16"})
    _, tensors = contents(tmp_path)
    weight = np.frombuffer(tensors["embedding.weight", "weight"], np.uint32)
    assert (weight & 0xFFFF).any()
