"""What a run folder says: its metrics, its evaluation, its model."""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_zebra.config.load import load_config
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture, resolve

Series = npt.NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)  # that a chart can show
MOST_COUNTED = 2**53  # steps and tokens beyond it are no whole numbers to a chart
_STEP = re.compile(r"^(.*)-step-(\d+)$")  # a result of training, as evaluation.tasks writes it


@dataclass(frozen=True)
class Metrics:
    """Columns of metrics.jsonl; nan where a step has no such value (or one too large to show)."""

    steps: Series
    columns: dict[str, Series]

    def column(self, name: str) -> Series:
        """[steps], all nan for a name that no line has."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    @property
    def validation(self) -> dict[str, tuple[Series, Series]]:
        """Of each validation set: steps and losses, where there are any."""
        found = {}
        for name, values in self.starting("valid/").items():
            there = np.isfinite(values)
            found[name] = (self.steps[there], values[there])
        return found

    def starting(self, prefix: str) -> dict[str, Series]:
        """Columns whose name begins with ``prefix``, by the rest of it, where they have a value."""
        return {
            name.removeprefix(prefix): values
            for name, values in self.columns.items()
            if name.startswith(prefix) and np.isfinite(values).any()
        }


@dataclass(frozen=True)
class ByPosition:
    """Mean loss [bins] of one set at positions ``edges[i] .. edges[i + 1] - 1`` of a document; nan where empty."""

    edges: list[int]
    loss: Series


def read_metrics(file: Path) -> Metrics:
    """Read metrics.jsonl; a last line without its end is another process's, still being written, and is left out.

    Raises:
        UserError: it is missing, empty, or a line is not what training writes.
    """
    records = [record for record, _ in _lines(file)]
    if not records:
        raise UserError(f"{file}: holds no step yet")
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: np.array([_number(record.get(name)) for record in records]) for name in names}
    return Metrics(columns["step"], columns)


def read_by_position(file: Path) -> dict[str, ByPosition]:
    """Loss by position of each set in an evaluation's JSON ({"sets": {name: {"edges": [...], "loss_by_position": [...]}}}).

    Raises:
        UserError: it cannot be read, or is something else.
    """
    return _by_position(read_json(file), str(file))


def read_evaluations(file: Path) -> list[tuple[int, dict[str, ByPosition]]]:
    """Loss by position at each of training's evaluations, with its step (evaluation.jsonl); none where there is no file.

    Raises:
        UserError: it cannot be read, or a line is not what training writes.
    """
    lines = _lines(file) if file.exists() else []
    return [(record["step"], _by_position(record, where)) for record, where in lines]


def newest_results(folder: Path) -> dict[str, tuple[Path, int | None]]:
    """The results of an evaluation's folder by name, each with its step of training; a plain one, of the tool and without
    a step, goes before those of training."""
    found: dict[str, tuple[Path, int | None]] = {}
    for file in sorted(folder.glob("*.json")):
        match = _STEP.match(file.stem)
        name, step = (match[1], int(match[2])) if match else (file.stem, None)
        before = found[name][1] if name in found else -1
        if before is not None and (step is None or step > before):
            found[name] = file, step
    return found


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is not JSON") from None


def read_text(file: Path) -> str:
    """
    Raises:
        UserError: it cannot be read, or is not text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None


def read_architecture(run_dir: Path) -> Architecture:
    """The model of the run's config.yaml (its vocabulary may be unknown: 1 then).

    Raises:
        UserError: there is no such file, or it is not a configuration.
    """
    config = load_config(run_dir / "config.yaml", {})
    return resolve(config.model, 1, config.data.sequence_length)


def _by_position(document: Any, where: str) -> dict[str, ByPosition]:
    try:
        found = {
            str(name): ByPosition(
                [int(edge) for edge in values["edges"]],
                np.array([_number(loss) for loss in values["loss_by_position"]]),
            )
            for name, values in document["sets"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{where}: is not an evaluation's result (sets with edges and loss_by_position)") from None
    for name, values in found.items():
        edges = values.edges
        rising = all(a < b for a, b in itertools.pairwise([-1, *edges, MOST_COUNTED]))
        if len(edges) != len(values.loss) + 1 or len(edges) < 2 or not rising:
            raise UserError(f"{where}: set '{name}' needs rising edges from 0, one more than losses")
    return found


def _lines(file: Path) -> list[tuple[dict[str, Any], str]]:
    """Records of a file of JSON lines, each with its place; what follows the last line's end is still being written."""
    lines = enumerate(read_text(file).split("\n")[:-1], 1)
    places = ((line, f"{file}, line {number}") for number, line in lines if line.strip())
    return [(_record(line, where), where) for line, where in places]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: is not JSON") from None
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int or not 0 <= step <= MOST_COUNTED:
        raise UserError(f"{where}: is not a step's record (needs a whole number 'step')")
    return record


def _number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return math.nan
