"""Runs of train() in this process or in each process of a pool, with what a test wants to do to them and know of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_zebra.checkpoint.catalog import newest
from megatron_zebra.checkpoint.reader import open_checkpoint
from megatron_zebra.errors import UserError
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import ShardedOptimizer
from megatron_zebra.training import loop
from megatron_zebra.training.adopt import adopted
from megatron_zebra.training.build import Trained
from tests.training.cases import opened, small

SAME = ("step", "loss", "grad_norm", "learning_rate", "consumed_rows", "consumed_tokens", "targets", "skipped_steps")


class Crash(Exception):
    """The end of a run that a test wants, in the middle of a step."""


@dataclass
class Seen:
    """What one rank saw of its run."""

    error: str | None = None
    applied: list[bool] = field(default_factory=list)
    unchanged: list[bool] = field(default_factory=list)
    """By step: every bit of this rank's masters, moments and weights is as before the step."""
    norms: list[float] = field(default_factory=list)
    updates: int = 0


def run(
    grid: Grid, folder: Path, overrides: dict[str, Any], crash_at: int | None = None, poison: Sequence[int] = ()
) -> Seen:
    """train() in ``folder``; a UserError or the crash ends it.

    Args:
        crash_at: the step (from 1) that is begun and never ends, on all ranks.
        poison: steps (from 1) at which the gradient of the last rank is not a number.
    """
    try:
        config = adopted(small(**overrides), folder)
    except UserError as error:
        return Seen(str(error))
    arch, inputs = opened(config)
    seen = Seen()
    real_step = loop.train_step

    def step(trained: Trained, *args: Any, **more: Any) -> Any:
        optimizer, runner = trained.optimizer, trained.runner
        number = len(seen.applied) + 1
        if number == crash_at:
            raise Crash
        before = _state(optimizer)
        if number in poison and grid.rank == grid.world_size - 1:
            train = runner.train
            with patch.object(runner, "train", lambda batches, scale: train(batches, scale * float("nan"))):
                outcome = real_step(trained, *args, **more)
        else:
            outcome = real_step(trained, *args, **more)
        seen.applied.append(outcome.result.applied)
        seen.norms.append(outcome.result.norm)
        seen.unchanged.append(all(torch.equal(a, b) for a, b in zip(before, _state(optimizer), strict=True)))
        seen.updates = optimizer.updates()
        return outcome

    # The picture of a run is tested elsewhere; matplotlib costs a second each time.
    with patch.object(loop, "train_step", step), patch.object(loop, "write_plots", create=True):
        try:
            loop.train(config, arch, inputs, folder, grid)
        except UserError as error:
            seen.error = str(error)
        except Crash:
            seen.error = "crash"
    return seen


def _state(optimizer: ShardedOptimizer) -> list[torch.Tensor]:
    """Copies of what this rank holds, and of the weights that its model computes with."""
    held = [tensor.clone() for part in optimizer.held() for tensor in part.tensors.values()]
    weights = [getattr(param, "ds_tensor", param).detach().clone() for param in optimizer.module.parameters()]
    return held + weights


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[dict[str, Any]]:
    """What must be the same bit for bit after a resume, of each step."""
    return [{name: record[name] for name in SAME} for record in metrics(folder)]


def contents(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], bytes]]:
    """Progress and every tensor (name, kind) of the newest checkpoint of a run."""
    place = newest(folder / "checkpoints")
    assert place is not None
    checkpoint = open_checkpoint(place)
    tensors = {key: checkpoint.read(*key).tobytes() for key in checkpoint.tensors()}
    return checkpoint.metadata["progress"], tensors
