"""Tasks of tools/evaluate.py on the model in training: ``evaluation.tasks``."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_zebra.config.sections import Config, EvaluationTask
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import Parser, write_json
from megatron_zebra.training.metrics import Record
from megatron_zebra.training.run_folder import writing

if TYPE_CHECKING:
    from megatron_zebra.evaluation.subject import Subject


@dataclass(frozen=True)
class Planned:
    """A task to run every ``interval`` steps; ``module`` is its own, of ``evaluation.tasks``."""

    name: str
    interval: int
    module: Any
    options: argparse.Namespace


def planned(config: Config) -> list[Planned]:
    """The tasks of ``config``, their options read and checked as the tool does.

    Raises:
        UserError: an option is wrong, or something that it names is.
    """
    return [_planned(config, number, task) for number, task in enumerate(config.evaluation.tasks)]


def rehearse(tasks: list[Planned], vocab_size: int) -> None:
    """Read what the tasks will read: a run shall not end at its first evaluation for what can be known before it starts.

    Raises:
        UserError: a text, a data set or a tokenizer does not do for a model of ``vocab_size``.
    """
    for number, task in enumerate(tasks):
        with _naming(number):
            task.module.rehearse(task.options, vocab_size)


def _planned(config: Config, number: int, task: EvaluationTask) -> Planned:
    module = _module(task)
    with _naming(number):
        options = read_options(task, config)
        if getattr(options, "tokenizer", Path()) is None:
            raise UserError("--tokenizer: must be given, since data.tokenizer is not")
        module.check(options)
    return Planned(task.name or task.task, task.interval, module, options)


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluation.tasks[{number}].options: {error}") from None


def read_options(task: EvaluationTask, config: Config) -> argparse.Namespace:
    """What the tool would make of them; UserError if it does not know one, or not such a value."""
    given = dict(task.options)
    if task.task != "perplexity" and config.data.tokenizer is not None:
        given.setdefault("tokenizer", config.data.tokenizer)
    parser = Parser(add_help=False, allow_abbrev=False)
    _module(task).options(parser)
    return parser.parse_args(_words(given), argparse.Namespace(tp=config.parallel.tp, cp=config.parallel.cp))


def _module(task: EvaluationTask) -> Any:
    return import_module(f"megatron_zebra.evaluation.tasks.{task.task}")


def _words(options: dict[str, Any]) -> list[str]:
    """As on the command line: {sequence_length: [1, 2], by_document: true} is --sequence-length 1 2 --by-document."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def run_task(task: Planned, subject: "Subject", folder: Path, record: Record) -> str:
    """Judge the model at the step of ``record``, which its numbers are added to as NAME/...; called by all ranks.

    Returns:
        A line that tells the numbers.
    """
    modules = [] if subject.decoder is None else [subject.decoder]
    training = [module.training for module in modules]
    result = task.module.measure(subject, task.options)
    for module, before in zip(modules, training):
        module.train(before)
    found = task.module.numbers(result)
    record |= {f"{task.name}/{name}": value for name, value in found.items()}
    if subject.grid.is_main:
        file = folder / "evaluation" / f"{task.name}-step-{record['step']:08d}.json"
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            write_json({"step": record["step"], **result}, file)
    return f"{task.name} at step {record['step']}: {'  '.join(f'{name} {value:.4f}' for name, value in found.items())}"
