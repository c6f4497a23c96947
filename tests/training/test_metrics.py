"""metrics.jsonl, TensorBoard and wandb: every step once, in order, over a resume."""

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_zebra.errors import UserError
from megatron_zebra.training.loggers import TensorBoard, Wandb
from megatron_zebra.training.metrics import Appended, MetricsFile
from megatron_zebra.training.sinks import Sinks
from tests.training.cases import small

ODD_STEPS = ('{"step": 1e400}\n', "[" * 100_000 + "\n")


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_floats_are_kept_to_the_last_bit_and_nan_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m", 0)
    file.write({"step": 1, "loss": 0.1 + 0.2, "grad_norm": math.nan, "tokens_per_second": math.inf})
    file.write({"step": 2, "sets": {"a": {"loss_by_position": [math.nan, 1.5, None]}}})
    line, nested = (tmp_path / "m").read_text().splitlines()  # there before the file is closed
    assert json.loads(nested)["sets"] == {"a": {"loss_by_position": [None, 1.5, None]}}
    assert json.loads(line) == {"step": 1, "loss": 0.30000000000000004, "grad_norm": None, "tokens_per_second": None}
    file.close()


@pytest.mark.parametrize(
    "tail", ["", '{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\0", '{"loss": 1}\n', *ODD_STEPS]
)
def test_a_resume_keeps_whole_lines_up_to_its_step(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    for restored, kept in ((2, [1, 2]), (1, [1])):
        file = MetricsFile(path, restored)
        file.write({"step": restored + 1})
        file.close()
        assert steps(path) == [*kept, restored + 1]


def test_a_full_disk_is_a_warning_and_what_waited_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    with open("/dev/full", "ab", buffering=0) as full, Sinks(small(), tmp_path, 0, True, said.append) as sinks:
        (metrics,) = sinks.outputs
        records = metrics._records  # type: ignore[attr-defined]
        disk, records._file = records._file, full
        sinks.write({"step": 1})
        sinks.write({"step": 2})
        records._file = disk
        sinks.write({"step": 3})
        records._file = full
        sinks.write({"step": 4})
    left = "are kept until the disk takes them: No space left on device"
    assert said == [f"warning: metrics from step {step} on {left}" for step in (1, 4)]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    disk.close()


def test_a_server_that_is_away_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    away = OSError(errno.ESTALE, "Stale file handle")
    with Sinks(small(), tmp_path, 0, True, said.append) as sinks:
        with patch.object(Appended, "_write", side_effect=away):
            sinks.write({"step": 1})
        sinks.write({"step": 2})
    assert said == ["warning: metrics from step 1 on are kept until the disk takes them: Stale file handle"]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_another_fault_of_the_disk_is_one_line(tmp_path: Path) -> None:
    error = OSError(errno.EACCES, "Permission denied")
    told = pytest.raises(UserError, match="metrics of step 1 cannot be written: Permission denied")
    with (
        Sinks(small(), tmp_path, 0, True, print) as sinks,
        patch.object(Appended, "_write", side_effect=error),
        told,
    ):
        sinks.write({"step": 1})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Sinks(small(logging__tensorboard=True), tmp_path, 0, False, print) as sinks:
        sinks.write({"step": 1})
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, restored in ((1, 5, 0), (4, 6, 3)):
        writer = TensorBoard(tmp_path, restored)
        for step in range(first, last + 1):
            writer.write({"step": step, "loss": float(step * first), "mfu": None})
        writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 16.0), (5, 20.0), (6, 24.0)
    ]  # fmt: skip
    assert "mfu" not in events.Tags()["scalars"]


def test_tensorboard_has_every_step_once_after_a_full_disk(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said: list[str] = []
    with (
        open("/dev/full", "ab", buffering=0) as full,
        Sinks(small(logging__tensorboard=True), tmp_path, 0, True, said.append) as sinks,
    ):
        records = sinks.outputs[1]._records._writer  # type: ignore[attr-defined]
        disk = records._file
        for step in range(1, 5):
            records._file = full if step in (2, 3) else disk
            sinks.write({"step": step, "loss": 0.5 * step})
    assert len(said) == 1
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


class FakeRun:
    """What wandb.init gave, and what was logged to it."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.metrics, self.logged, self.finished = settings, [], [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, record: dict[str, Any]) -> None:
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


def test_S04_one_wandb_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in there
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    runs: list[FakeRun] = []
    monkeypatch.setattr(wandb, "init", lambda **settings: runs.append(FakeRun(**settings)) or runs[-1])
    folder = tmp_path / "run"
    folder.mkdir()
    config = small(logging__wandb__enabled=True, logging__wandb__project="p")
    for steps_of_run in ((1, 2, 3), (3, 4)):  # the second resumes from step 2
        writer = Wandb(config, folder)
        for step in steps_of_run:
            writer.write({"step": step, "loss": 1.0, "mfu": None})
        writer.close()
    first, second = runs
    assert first.settings["id"] == second.settings["id"]
    assert second.settings["resume"] == "allow"
    assert first.settings["mode"] == "offline"
    assert (first.settings["project"], first.settings["name"]) == ("p", "run")
    assert first.settings["config"]["model"]["window_size"] == 7
    assert first.metrics == [("*", "step")]  # an axis of our own: wandb's counter would drop what is logged again
    assert [record["step"] for run in runs for record in run.logged] == [1, 2, 3, 3, 4]
    assert first.finished
    assert second.finished
    assert Wandb(config, _folder(tmp_path / "other"))._run.settings["id"] != first.settings["id"]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_mode_of_wandb_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", FakeRun)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert Wandb(small(), tmp_path)._run.settings["mode"] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Wandb(small(), tmp_path)._run.settings["mode"] is None  # wandb reads it itself
    assert os.environ["WANDB_MODE"] == "disabled"


def test_what_wandb_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match=r"logging\.wandb: Invalid project name 'a/b'"):
        Wandb(small(logging__wandb__enabled=True, logging__wandb__project="a/b"), tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb\.enabled = true: needs the package wandb"):
        Wandb(small(), tmp_path)


def test_an_empty_wandb_id_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", FakeRun)
    (tmp_path / "wandb.id").write_text("")
    assert Wandb(small(), tmp_path)._run.settings["id"] == (tmp_path / "wandb.id").read_text() != ""
