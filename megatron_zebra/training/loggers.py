"""Optional places that metrics go to beside metrics.jsonl; only the main rank has them."""

import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from megatron_zebra.config.load import to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.training.metrics import Record


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
    """Events in the run folder; those after the restored step are purged when a run resumes."""

    def __init__(self, folder: Path, restored_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard = true: needs the package tensorboard (pip install tensorboard)"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=restored_step + 1 if restored_step else None)

    def write(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One run per run folder: its id lies there, and a resumed job goes on with it. Offline unless logged in."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb
        import yaml

        file = folder / "wandb.id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        self._run = wandb.init(
            id=file.read_text().strip(),
            resume="allow",
            project=config.logging.wandb.project,
            name=config.logging.wandb.name or folder.name,
            dir=str(folder),
            mode=None if "WANDB_MODE" in os.environ else "online" if logged_in else "offline",
            config=yaml.safe_load(to_yaml(config)),
        )
        # Own axis: wandb's counter only rises, and drops what a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(_numbers(record))

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float))}
