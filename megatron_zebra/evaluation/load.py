"""A trained model without an optimizer."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_zebra.config.sections import Parallel
from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import ModelSource, open_model
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.subject import Subject
from megatron_zebra.evaluation.tasks.common import make_room, output_of
from megatron_zebra.inference.load import check_tp
from megatron_zebra.launched import launched
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.context.shard import ContextParallel
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import WorldCollective, world
from megatron_zebra.pipeline.runner import WholeModel
from megatron_zebra.pipeline.split import pipeline_stages
from megatron_zebra.pipeline.stages import Pipeline


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Architecture, Decoder]:
    """The decoder of a checkpoint, a run folder or a Hugging Face folder; a checkpoint is checked while it is read."""
    source = open_model(path)
    return source.architecture, load_decoder(source, device, dtype)


class Opened(NamedTuple):
    """``output`` is where the result goes, and can be written."""

    subject: Subject
    source: ModelSource
    output: Path


@contextmanager
def opened(arguments: argparse.Namespace, result: str, longest: int = 1, tp: int | None = None) -> Iterator[Opened]:
    """The model of ``arguments.checkpoint`` on all processes, divided by --tp, --cp, --pp; several copies share the work.

    Args:
        result: name of the file if ``arguments.output`` names none.
        longest: tokens of the longest row, the length that pipeline stages are balanced for.
        tp: of a task without --tp.
    """
    axes: dict[str, Any] = {axis: getattr(arguments, axis, 1) for axis in ("tp", "cp", "pp")}
    axes["tp"] = tp or axes["tp"]
    size = launched().world_size
    if size % prod(axes.values()):
        given = " x ".join(f"--{axis} {ranks}" for axis, ranks in axes.items())
        raise UserError(f"{given}: must divide the number of processes, {size} (torchrun --nproc-per-node starts more)")
    with world(arguments.device, 600.0, **axes, named="--device") as grid:
        source = open_model(arguments.checkpoint, WorldCollective(grid))
        check_tp(source.architecture, axes["tp"], f"{tp} processes" if tp else f"--tp {axes['tp']}")
        if axes["pp"] > source.architecture.num_layers:
            raise UserError(f"--pp {axes['pp']}: must not be above the model's {source.architecture.num_layers} layers")
        output = output_of(arguments, source.folder, result)
        if grid.is_main:
            make_room(output)
        dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
        yield Opened(load_subject(source, grid, dtype, longest), source, output)


def load_subject(source: ModelSource, grid: Grid, dtype: torch.dtype, longest: int = 1) -> Subject:
    """This rank's part of the model; see ``opened``."""
    arch, pp, context = source.architecture, grid.pp.size, ContextParallel(grid.cp, keep_fetched=True)
    if pp == 1:
        decoder = load_decoder(source, grid.device, dtype, tp=grid.tp)
        return Subject(arch, grid, WholeModel(decoder), context, decoder)
    stages = pipeline_stages(Parallel(pp=pp), arch, longest)
    stage = load_decoder(source, grid.device, dtype, tp=grid.tp, layers=stages.layers[grid.pp.rank])
    runner = Pipeline({grid.pp.rank: stage}, pp, "1f1b", grid, arch.hidden_size, dtype, collect=lambda: None)
    return Subject(arch, grid, runner, context, None)
