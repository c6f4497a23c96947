"""Results of several models side by side. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks import answers, harness, perplexity, retrieval
from megatron_zebra.report.run import ByPosition, newest_results, read_by_position, read_metrics

KINDS: dict[str, Any] = {"perplexity": perplexity, "answers": answers, "retrieval": retrieval, "harness": harness}


@dataclass(frozen=True)
class Results:
    """Of one model: ``numbers`` by name, and the loss by position of each data set."""

    title: str
    numbers: dict[str, float]
    positions: dict[str, ByPosition]


def read_results(path: Path, title: str) -> Results:
    """Of a result's JSON file, or of all that a run or a model's folder holds: metrics.jsonl and evaluation/*.json. Of results
    at several steps of a training, those of the last.

    Raises:
        UserError: there is none, or it is something else.
    """
    if path.is_file():
        document = _document(path)
        return Results(title, _named(_kind(path, document), path, document), _positions(path, document))
    numbers: dict[str, float] = {}
    positions: dict[str, ByPosition] = {}
    if (path / "metrics.jsonl").is_file():
        numbers |= _of_training(path / "metrics.jsonl")
    for name, (file, _) in newest_results(path / "evaluation").items():
        document = _document(file)
        numbers |= _named(name, file, document)
        positions |= _positions(file, document)
    if not numbers:
        raise UserError(
            f"{path}: holds no result; allowed are a run's folder, a folder with evaluation/*.json, and such files"
        )
    return Results(title, numbers, positions)


def titles(paths: Sequence[Path]) -> list[str]:
    """What to call each: its last name, or all of it where two have the same."""
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    return [str(path) if short.count(name) > 1 else name for path, name in zip(paths, short)]


def table(results: Sequence[Results]) -> str:
    """A row a number, a column a model."""
    names = list(dict.fromkeys(name for one in results for name in one.numbers))
    rows = [["", *(one.title for one in results)]]
    rows += [[name, *(_value(one.numbers.get(name)) for one in results)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def curves(results: Sequence[Results]) -> dict[str, ByPosition]:
    """Loss by position of every model and data set, each with a name that tells which."""
    sets = {name for one in results for name in one.positions}
    return {
        one.title if len(sets) == 1 else f"{one.title}, {name}": values
        for one in results
        for name, values in one.positions.items()
    }


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is not JSON") from None
    return document if isinstance(document, dict) else {}


def _kind(file: Path, document: dict[str, Any]) -> str:
    """Which task's result it is, by its shape."""
    if "sets" in document:
        return "perplexity"
    if "by_length" in document:
        return "answers"
    tasks = document.get("tasks")
    if isinstance(tasks, dict):
        whole = all(isinstance(values, dict) and "by_length" in values for values in tasks.values())
        return "retrieval" if whole else "harness"
    raise UserError(f"{file}: is no result of tools/evaluate.py ({', '.join(KINDS)})")


def _named(name: str, file: Path, document: dict[str, Any]) -> dict[str, float]:
    kind = _kind(file, document)
    try:
        found = KINDS[kind].numbers(document).items()
        return {f"{name}/{key}": math.nan if value is None else float(value) for key, value in found}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise UserError(f"{file}: is no whole result of tools/evaluate.py {kind}") from None


def _positions(file: Path, document: dict[str, Any]) -> dict[str, ByPosition]:
    return read_by_position(file) if "sets" in document else {}


def _of_training(file: Path) -> dict[str, float]:
    """How far it is, and its last losses."""
    metrics = read_metrics(file)
    found = {"step": float(metrics.steps[-1])}
    for name, values in metrics.columns.items():
        there = values[np.isfinite(values)]
        if there.size and (name in ("loss", "consumed_tokens") or name.startswith("valid/")):
            found["training loss" if name == "loss" else name.replace("_", " ")] = float(there[-1])
    return found


def _value(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 1000 and number == int(number) else f"{number:.4f}".removesuffix(".0000")
