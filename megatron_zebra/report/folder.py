"""All that a report shows of one run folder."""

import contextlib
import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zebra.checkpoint.catalog import entries
from megatron_zebra.config.check import problems
from megatron_zebra.config.derived import longest_sequence, ranks_per_replica
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.stages import Stages
from megatron_zebra.report.run import (
    MOST_COUNTED,
    ByPosition,
    Metrics,
    Series,
    newest_results,
    read_by_position,
    read_evaluations,
    read_json,
    read_metrics,
)


@dataclass(frozen=True)
class Exact:
    """Shares of exact answers [lengths, depths], nan where nothing was asked."""

    lengths: list[str]
    depths: list[str]
    exact: Series


@dataclass(frozen=True)
class Saved:
    """A checkpoint's step and bytes; ``complete``: it has its index."""

    step: int
    bytes: int
    complete: bool


@dataclass(frozen=True)
class Run:
    """A run folder, read. What older runs did not write is None or empty.

    vocabulary: whether the architecture's is known.
    layout: None where the number of processes is not known.
    evaluations: of each of training's evaluations the step, and by set the loss by position.
    evaluated: the same of tools/evaluate.py perplexity, or of the newest such run of evaluation.tasks.
    answers: by task, of tools/evaluate.py answers and retrieval, or of the newest such run of evaluation.tasks.
    """

    name: str
    folder: Path
    config: Config
    arch: Architecture
    vocabulary: bool
    layout: Layout | None
    metrics: Metrics
    evaluations: list[tuple[int, dict[str, ByPosition]]]
    evaluated: dict[str, ByPosition]
    answers: dict[str, Exact]
    checkpoints: list[Saved]

    @property
    def stages(self) -> Stages:
        return stages_of(self.config, self.arch)


def read_runs(folders: list[Path]) -> list[Run]:
    """Read each folder; a run goes by its folder's name, or where two have the same by the path as given.

    Raises:
        UserError: a folder is none, is given twice, or a file in it is missing or broken.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places):
        if places.count(place) > 1:
            raise UserError(f"{folder}: is given twice")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]


def read_run(folder: Path) -> Run:
    """
    Raises:
        UserError: it is no run folder, or a file in it is missing or broken.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no run folder" if folder.exists() else f"{folder}: no such run folder")
    metrics = read_metrics(folder / "metrics.jsonl")
    environment = _environment(folder / "environment.json")
    world_size = environment.get("world_size")
    config = _config(folder / "config.yaml", world_size)
    parallel, vocab_size = config.parallel, environment.get("vocab_size") or config.model.vocab_size
    evaluated, answers = _results(folder / "evaluation", config)
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        arch=resolve(config.model, vocab_size or 1, longest_sequence(config)),
        vocabulary=bool(vocab_size),
        layout=Layout.of(world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp) if world_size else None,
        metrics=metrics,
        evaluations=read_evaluations(folder / "evaluation.jsonl"),
        evaluated=evaluated,
        answers=answers,
        checkpoints=_checkpoints(folder / "checkpoints"),
    )


def _environment(file: Path) -> dict[str, int]:
    """The whole numbers of environment.json; empty where there is none."""
    document = read_json(file) if file.exists() else {}
    if not isinstance(document, dict):
        raise UserError(f"{file}: is not what training writes (an object)")
    return {name: value for name, value in document.items() if type(value) is int and 0 < value <= MOST_COUNTED}


def _config(file: Path, world_size: int | None) -> Config:
    try:
        config = load_config(file, {})
    except UserError as error:
        line = str(error).splitlines()[0].removeprefix("--config ")
        raise UserError(line if str(file) in line else f"{file}: {line}") from None
    if wrong := problems(config, world_size or ranks_per_replica(config.parallel)):
        raise UserError(f"{file}: {wrong[0]}")
    return config


def _results(folder: Path, config: Config) -> tuple[dict[str, ByPosition], dict[str, Exact]]:
    """Losses by position, and answers, of the tool's own results and of the tasks that ran in training."""
    kinds = {kind: kind for kind in ("perplexity", "answers", "retrieval")}
    kinds |= {task.name or task.task: task.task for task in config.evaluation.tasks}
    evaluated: dict[str, ByPosition] = {}
    answers: dict[str, Exact] = {}
    for name, (file, step) in newest_results(folder).items():
        kind, when = kinds.get(name), "" if step is None else f", step {step:,}"
        whose = ("" if name == kind else f", {name}") + when
        if kind == "perplexity":
            evaluated |= {f"{of}{whose}": values for of, values in read_by_position(file).items()}
        elif kind in ("answers", "retrieval"):
            grids = _grids(read_json(file), str(file))
            if not grids:
                raise UserError(f"{file}: is not an evaluation's result (exact by lengths and depth_edges)")
            answers |= {f"{task}{whose}" if task else f"{name}{when}": grid for task, grid in grids}
    return evaluated, answers


def _grids(document: Any, where: str) -> list[tuple[str, Exact]]:
    """Each table of ``evaluation.answers.tables`` in the document, at whatever depth, by the name that it stands under."""
    found, waiting = [], [("", document)]
    while waiting:
        task, inner = waiting.pop()
        if isinstance(inner, dict) and {"lengths", "depth_edges", "exact"} <= inner.keys():
            found.append((task, _grid(inner, where)))
        elif isinstance(inner, dict):
            waiting += reversed(inner.items())
    return found


def _grid(document: dict[str, Any], where: str) -> Exact:
    try:
        exact = np.array(document["exact"], dtype=np.float64)
        edges = [f"{edge:.3g}" for edge in document["depth_edges"]]
        grid = Exact([f"{length:,}" for length in document["lengths"]], list(map("–".join, pairwise(edges))), exact)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: lengths, depth_edges and exact are not numbers") from None
    if exact.shape != (len(grid.lengths), len(grid.depths)):
        raise UserError(f"{where}: exact must have a row a length and a column a depth")
    return grid


def _checkpoints(root: Path) -> list[Saved]:
    try:
        return [Saved(entry.step, _size(entry.folder), entry.complete) for entry in entries(root)]
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror})") from None


def _size(folder: Path) -> int:
    """Bytes of its files; one that the run removes meanwhile counts nothing."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size
