"""Optional places that metrics go to beside metrics.jsonl; only the main rank has them."""

import os
import platform
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from megatron_zebra.config.load import to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.training.metrics import Appended, Record
from megatron_zebra.training.run_folder import writing


class Logger(Protocol):
    """Takes each step's record."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def open_loggers(config: Config, folder: Path, restored_step: int) -> list[Logger]:
    """Those that ``config.logging`` asks for."""
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", restored_step))
    if config.logging.wandb.enabled:
        loggers.append(Wandb(config, folder))
    return loggers


class TensorBoard:
    """Events in the run folder; those after the restored step are purged when a run resumes.

    They are written at once: torch's SummaryWriter writes on a thread that a full disk ends for good.
    """

    def __init__(self, folder: Path, restored_step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard = true: needs the package tensorboard (pip install tensorboard)"
            ) from None
        self._event, self._summary = Event, Summary
        with writing(folder):
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{platform.node()}.{os.getpid()}"
            self._records = RecordWriter(Appended((folder / name).open("ab", buffering=0)))
            self._write(0, file_version="brain.Event:2")
            if restored_step:
                self._write(restored_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Record) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(record).items()]
        self._write(record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())


class Wandb:
    """One run per run folder: its id lies there, and a resumed job goes on with it. Offline unless logged in."""

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb.enabled = true: needs the package wandb (pip install wandb)") from None
        import yaml

        file = folder / "wandb.id"
        with writing(file):
            name = file.read_text().strip() if file.exists() else ""
            if not name:  # also where a full disk left an empty file
                name = secrets.token_hex(4)
                file.write_text(name)
        logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        try:
            self._run = wandb.init(
                id=name,
                resume="allow",
                project=config.logging.wandb.project,
                name=config.logging.wandb.name or folder.name,
                dir=str(folder),
                mode=None if "WANDB_MODE" in os.environ else "online" if logged_in else "offline",
                config=yaml.safe_load(to_yaml(config)),
            )
        except wandb.errors.Error as error:
            raise UserError(f"logging.wandb: {' '.join(str(error).split())}") from None
        # Own axis: wandb's counter only rises, and drops what a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(_numbers(record))

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float))}
