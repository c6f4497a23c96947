"""What tasks share: the options that name a model and a result, and the result's file."""

import argparse
import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_zebra.checkpoint.layout import INDEX
from megatron_zebra.checkpoint.locate import run_of
from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError
from megatron_zebra.plain import plain


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_model(task: argparse.ArgumentParser) -> None:
    """--checkpoint, --precision, --device."""
    task.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="MODEL",
        help="a checkpoint, a run folder (its newest good one), a Hugging Face folder, a GGUF file",
    )
    task.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")
    task.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def add_output(task: argparse.ArgumentParser, name: str, more: str = "") -> None:
    """--output, by default ``name`` in the run's folder."""
    told = f"JSON file{more} (default: evaluation/{name} in the run folder)"
    task.add_argument("--output", type=_json_name, metavar="FILE", help=told)


def _json_name(text: str) -> Path:
    output = output_name(text)
    if output.suffix.lower() == ".png":  # the picture's, which would take the result's place
        raise argparse.ArgumentTypeError(f"must not end in .png, as pictures do: it is a JSON file, not {text}")
    return output


def count(text: str) -> int:
    """An option's value that is a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def home_of(folder: Path) -> Path:
    """The run that a checkpoint belongs to; any other model's own folder."""
    if (folder / INDEX).is_file() and (run := run_of(folder)):  # a folder named checkpoints may hold any models
        return run
    return folder if folder.is_dir() else folder.parent


def output_of(arguments: argparse.Namespace, folder: Path, name: str) -> Path:
    """Where the result of judging the model of ``folder`` goes."""
    output: Path = arguments.output or home_of(folder) / "evaluation" / name
    return output


def make_room(output: Path) -> None:
    """Find out before the work that its result could not be written."""
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_result(document: dict[str, Any], output: Path) -> None:
    """Into the file of --output."""
    with writing(output):
        write_json(document, output)


def write_json(document: dict[str, Any], file: Path) -> None:
    """A reader never sees half of it. The loss of a model that has diverged is null."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn the system's complaint about --output into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
