"""The loop on real files: validation sets, blends, schedules of length and batch, what is written beside the metrics."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from megatron_zebra.data.batch import read_step
from megatron_zebra.data.rows import IGNORE
from megatron_zebra.data.synthetic import SyntheticSource
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.training import loop
from tests.training.cases import opened, small
from tests.training.runs import Seen, contents, curve, metrics, run

QUICK = {"model__num_layers": 2, "training__global_batch_size": 4, "training__steps": 4}


def pair(prefix: Path, seed: int, documents: int = 30) -> str:
    """A pair of ragged documents on disk."""
    source = SyntheticSource(documents, 20, 101, seed)
    with PairWriter(prefix, Vocabulary(101, 0, "ab" * 32, "sentencepiece", "test.model")) as writer:
        for start, stop in zip(source.document_bounds(), source.document_bounds()[1:]):
            writer.add(source.read(int(start), int(stop)).astype(np.uint16), [int(stop - start)])
        writer.finish()
    return str(prefix)


def files(tmp_path: Path) -> dict[str, Any]:
    return {
        "data__synthetic__documents": 0,
        "data__train": [{"prefix": pair(tmp_path / "a", 1), "weight": 3.0}, {"prefix": pair(tmp_path / "b", 2)}],
    }


def test_the_loss_by_source_and_several_validation_sets(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | files(tmp_path)
    settings["data__valid"] = [pair(tmp_path / "c", 3), {"prefix": pair(tmp_path / "d", 4), "name": "other"}]
    run_distributed(run, 2, tmp_path / "run", settings | {"evaluation__interval": 3, "evaluation__rows": 5})
    records = metrics(tmp_path / "run")
    _, inputs = opened(small(**settings))
    for step, record in enumerate(records):
        (batch,) = read_step(inputs.train, step, step * 4, 4, 4).micro_batches
        targets = (batch.labels.view(4, -1) != IGNORE).sum(1).numpy()
        counts = {name: int(targets[batch.sources == number].sum()) for number, name in enumerate("ab")}
        assert record["targets"] == sum(counts.values())
        total = sum(record[f"loss/{name}"] * count for name, count in counts.items() if count)
        assert record["loss"] == pytest.approx(total / record["targets"], rel=1e-12)
    assert [[name for name in record if name.startswith("valid/")] for record in records] == [
        [],
        [],
        ["valid/c", "valid/other"],
        ["valid/c", "valid/other"],  # once more at the end
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    for line, record in zip(lines, records[2:], strict=True):
        assert {f"valid/{name}": values["loss"] for name, values in line["sets"].items()} == {
            name: loss for name, loss in record.items() if name.startswith("valid/")
        }
        for values in line["sets"].values():
            found = [loss for loss in values["loss_by_position"] if loss is not None]
            assert len(values["edges"]) == len(values["loss_by_position"]) + 1
            assert min(found) < values["loss"] < max(found)
    # Validation takes nothing from training.
    run_distributed(run, 2, tmp_path / "without", settings)
    assert curve(tmp_path / "without") == curve(tmp_path / "run")


def test_two_sources_of_one_name_keep_their_own_loss(run_distributed: Any, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    sources = [pair(tmp_path / "x" / "text", 1), pair(tmp_path / "y" / "text", 2)]
    settings = {"data__synthetic__documents": 0, "data__train": sources, "training__steps": 2}
    settings |= {"evaluation__interval": 1, "data__split": [0.8, 0.2, 0.0]}
    run_distributed(run, 1, tmp_path / "run", QUICK | settings)
    assert {"loss/text", "loss/text-2", "valid/text", "valid/text-2"} <= set(metrics(tmp_path / "run")[-1])


def test_phases_of_length_and_batch_are_trained_and_resumed(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {
        "optimizer__zero_stage": 3,
        "training__steps": 6,
        "data__sequence_schedule": [{"steps": 2, "sequence_length": 16}, {"steps": 2, "sequence_length": 64}],
        "training__batch_ramp": [{"steps": 1, "global_batch_size": 2}],
        "checkpoint__interval": 3,
    }
    run_distributed(run, 2, tmp_path / "whole", settings)
    records = metrics(tmp_path / "whole")
    assert [record["sequence_length"] for record in records] == [16, 16, 64, 64, 48, 48]
    assert [record["global_batch_size"] for record in records] == [2, 4, 4, 4, 4, 4]
    assert [record["consumed_rows"] for record in records] == [2, 6, 10, 14, 18, 22]
    tokens = np.cumsum([2 * 16, 4 * 16, 4 * 64, 4 * 64, 4 * 48, 4 * 48]).tolist()
    assert [record["consumed_tokens"] for record in records] == tokens
    run_distributed(run, 2, tmp_path / "resumed", settings, 5)  # from step 3: inside the second phase
    run_distributed(run, 2, tmp_path / "resumed", settings)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")


def test_batch_and_data_of_steps_done_may_not_change_under_a_sequence_schedule(
    run_distributed: Any, tmp_path: Path
) -> None:
    settings = QUICK | {"data__sequence_schedule": [{"steps": 2, "sequence_length": 16}]}
    run_distributed(run, 1, tmp_path, settings | {"training__steps": 3})
    (seen,) = run_distributed(run, 1, tmp_path, settings | {"training__global_batch_size": 8})
    assert seen.error is not None
    assert seen.error.startswith(
        "data.sequence_schedule: step 3 had consumed 12 rows, with this configuration it would be 24"
    )
    (seen,) = run_distributed(run, 1, tmp_path, settings | {"training__seed": 4})
    assert seen.error is not None
    assert seen.error.startswith("data.sequence_schedule: the training data or training.seed is another than before")


def test_a_deterministic_run_is_the_same_twice(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"training__deterministic": True, "training__precision": "bf16"}
    for name in ("one", "two"):
        run_distributed(run, 2, tmp_path / name, settings)
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_profile_memory_and_tensorboard_files_appear(run_distributed: Any, tmp_path: Path) -> None:
    settings = {"training__profile_steps": [3, 99], "training__memory_snapshot_steps": [1]}
    run_distributed(run, 2, tmp_path, QUICK | settings | {"logging__tensorboard": True})
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "steps-3-4-rank-00000.json.gz",
        "steps-3-4-rank-00001.json.gz",
    ]
    assert len(list((tmp_path / "memory").glob("step-1-rank-0000?.txt"))) == 2
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1  # one writer
    assert len(list((tmp_path / "logs").iterdir())) == 2


def signalled(grid: Grid, folder: Path, overrides: dict[str, Any], at: int, inside: str = "train_step") -> Seen:
    """A run in which rank 1 alone gets a SIGTERM in call ``at`` of the loop's function ``inside``."""
    real, count = getattr(loop, inside), 0

    def called(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and grid.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    with patch.object(loop, inside, called):
        return run(grid, folder, overrides)


def test_sigterm_on_one_rank_saves_on_all_and_the_run_goes_on_exactly(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"training__steps": 5}
    run_distributed(run, 2, tmp_path / "whole", settings)
    for seen in run_distributed(signalled, 2, tmp_path / "stopped", settings, 3):
        assert seen.error is None
        assert len(seen.applied) == 3
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text().strip() == "step-00000003"
    run_distributed(run, 2, tmp_path / "stopped", settings)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_signal_is_followed_by_the_save_and_not_by_an_evaluation(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"training__steps": 5, "evaluation__interval": 1, "data__split": [0.8, 0.2, 0.0]}
    run_distributed(signalled, 2, tmp_path, settings, 3)
    judged = [any(name.startswith("valid/") for name in record) for record in metrics(tmp_path)]
    assert judged == [True, True, False]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000003"


def test_a_signal_in_an_evaluation_is_followed_by_the_save_and_by_no_other(
    run_distributed: Any, tmp_path: Path
) -> None:
    rows = {"data": [pair(tmp_path / "held", 1)], "sequence_length": 16}
    settings = QUICK | {"evaluation__interval": 1, "data__split": [0.8, 0.2, 0.0]}
    settings |= {"evaluation__tasks": [{"task": "perplexity", "interval": 1, "options": rows}]}
    for seen in run_distributed(signalled, 2, tmp_path / "run", settings, 2, "evaluate"):
        assert seen.error is None
        assert len(seen.applied) == 2
    for start, wanted in (("valid/", [True, True]), ("perplexity/", [True, False])):
        records = metrics(tmp_path / "run")
        assert [any(name.startswith(start) for name in record) for record in records] == wanted
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000002"


def on_a_full_disk(grid: Grid, folder: Path, overrides: dict[str, Any]) -> Seen:
    """A run in which no file may grow past a mebibyte: less than a rank's part of a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        return run(grid, folder, overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_checkpoint(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"model__hidden_size": 192, "checkpoint__interval": 2, "checkpoint__keep_last": 1}
    run_distributed(run, 2, tmp_path, settings | {"training__steps": 1})
    before = contents(tmp_path)
    for seen in run_distributed(on_a_full_disk, 2, tmp_path, settings):
        assert len(seen.applied) == 3  # the save at step 2 was given up, that at the end ends the run
        assert seen.error is not None
        assert "File too large" in seen.error
        assert "\n" not in seen.error
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert contents(tmp_path) == before
    run_distributed(run, 2, tmp_path, settings)
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_bad_id_is_found_in_the_row_and_named(run_distributed: Any, tmp_path: Path) -> None:
    """A foreign pair, without a .json, is checked as it is read."""
    prefix = pair(tmp_path / "a", 1)
    Path(prefix + ".json").unlink()
    data = np.fromfile(prefix + ".bin", np.uint16)
    data[: len(data) // 2] = 101
    data.tofile(prefix + ".bin")
    settings = {"data__synthetic__documents": 0, "data__train": [prefix], "training__steps": 50}
    (seen,) = run_distributed(run, 1, tmp_path / "run", QUICK | settings)
    assert seen.error is not None
    assert "is id 101, but the vocabulary has the ids 0 to 100" in seen.error
