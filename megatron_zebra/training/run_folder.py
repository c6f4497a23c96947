"""The run folder: a run explains itself by what lies there."""

import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

from megatron_zebra.config.load import to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError

PACKAGES = ("megatron-zebra", "torch", "deepspeed", "flash-attn", "numpy", "sentencepiece", "wandb")


def run_folder(config: Config, config_file: str | None) -> Path:
    """Where this run lives: ``logging.run_dir``, or runs/ and the configuration's name."""
    return Path(config.logging.run_dir or Path("runs") / (Path(config_file).stem if config_file else "default"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one run at a time (the lock goes with the process, however it ends).

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"logging.run_dir = {folder}: cannot be written ({error.strerror})") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"logging.run_dir = {folder}: another run is writing there; stop it or give another folder"
            ) from None
        except OSError as error:
            print(
                f"warning: {folder}: no locks there ({error.strerror}); a second run in this folder would not be noticed",
                file=sys.stderr,
            )
        yield


def write_description(folder: Path, config: Config, world_size: int, vocab_size: int) -> None:
    """config.yaml (the former one kept under its time if it differs) and environment.json.

    Args:
        vocab_size: the model's; the configuration may leave it to the tokenizer.
    """
    file, text = folder / "config.yaml", to_yaml(config)
    with writing(file):
        if file.exists() and file.read_bytes() != text.encode():
            put_by(file)
        _write(file, text)
    environment = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "world_size": world_size,
        "vocab_size": vocab_size,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "NCCL_", "CUDA_", "TORCH_"))
        },
    }
    with writing(folder / "environment.json"):
        _write(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def rank_log(folder: Path, rank: int) -> logging.Logger:
    """This rank's log, logs/rank-00000.log."""
    logger = logging.getLogger(f"megatron_zebra.rank{rank}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file = folder / "logs" / f"rank-{rank:05d}.log"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is told where it matters
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger


def put_by(file: Path) -> Path:
    """Give a file of a former run a name of its own, config.until-20260131-120000.yaml; that path."""
    return file.rename(file.with_name(f"{file.stem}.until-{datetime.now():%Y%m%d-%H%M%S}{file.suffix}"))


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn the system's complaint about ``file`` into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
