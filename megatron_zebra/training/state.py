"""What a checkpoint holds beside tensors, and how both are saved and restored."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from megatron_zebra.checkpoint.catalog import retire_newer
from megatron_zebra.checkpoint.collective import Collective
from megatron_zebra.checkpoint.describe import compare_model
from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_zebra.checkpoint.save import Saved, save
from megatron_zebra.checkpoint.verify import Found
from megatron_zebra.config.fields import READ_BACK, in_words
from megatron_zebra.config.sections import Checkpoint as SaveSettings
from megatron_zebra.config.sections import Config, Lora
from megatron_zebra.convert.folder import check_stored, stored_architecture
from megatron_zebra.convert.source import ModelSource
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.lora import ADAPTERS, adapter_shapes, from_metadata, to_metadata
from megatron_zebra.model.trained import is_trained
from megatron_zebra.parallel.optimizer import KINDS, Held, ShardedOptimizer
from megatron_zebra.training.spike import Usual

Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``data`` names the training data that ``consumed_rows`` counts in,
    ``order`` how that numbers its rows, ``usual`` what losses it had."""

    __pydantic_config__ = READ_BACK

    step: Count = 0
    consumed_rows: Count = 0
    consumed_tokens: Count = 0
    skipped_steps: Count = 0
    schedule_start: Count = 0
    updates: Count = 0
    seed: Count = 0
    data: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    usual: Usual = field(default_factory=Usual)


_STORED = TypeAdapter(Progress)


@dataclass(frozen=True)
class State:
    """All that a checkpoint of ``step`` holds: this rank's pieces, what is said of them, and which tensors must be there."""

    step: int
    pieces: list[tuple[PieceKey, Any]]
    metadata: dict[str, Any]
    expected: dict[tuple[str, str], tuple[int, ...]]

    def save(self, root: Path, settings: SaveSettings, collective: Collective) -> Saved:
        """Write it under ``root``; called by all ranks."""
        return save(
            root,
            self.step,
            iter(self.pieces),
            self.metadata,
            collective=collective,
            expected=self.expected,
            expected_bytes=sum(tensor.nbytes for _, tensor in self.pieces),
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
        )


def state_of(progress: Progress, config: Config, arch: Architecture, optimizer: ShardedOptimizer) -> State:
    """The state at ``progress``; its pieces are the optimizer's own memory."""
    lora = config.training.lora
    shapes = arch.parameter_shapes() | adapter_shapes(arch, lora)
    expected = {
        (name, kind): shape
        for name, shape in shapes.items()
        for kind in (KINDS if is_trained(name, config.training) else ("weight",))
    }
    metadata: dict[str, Any] = {
        "architecture": arch.to_dict(),
        "progress": asdict(replace(progress, updates=optimizer.updates())),
    }
    if lora.rank:
        metadata["lora"] = to_metadata(lora)
    return State(progress.step, held_pieces(optimizer), metadata, expected)


def resume_state(
    root: Path, found: Found, config: Config, arch: Architecture, optimizer: ShardedOptimizer, collective: Collective
) -> Progress | None:
    """Restore the checkpoint ``found`` under ``root``, if there is one; called by all ranks. Gives how far it was.

    Raises:
        UserError: there are only damaged ones.
    """
    if found.folder is None or found.step is None:
        if found.rejected:
            # To begin anew over a damaged run would look like a resume and lose it.
            raise UserError(
                f"{root}: every checkpoint is damaged; move the folder away to begin anew ({found.skipped[0]})"
            )
        return None
    progress = restore(open_checkpoint(found.folder), config, arch, optimizer)
    if found.skipped and collective.rank == 0:
        retire_newer(root, found.step)
    return progress


@torch.no_grad()
def restore(checkpoint: Checkpoint, config: Config, arch: Architecture, optimizer: ShardedOptimizer) -> Progress:
    """Read what this rank holds of each tensor, moments too, into its optimizer.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    # How long the model may be used is told to others, and changes nothing here.
    stored = replace(stored_architecture(checkpoint.metadata, checkpoint.folder), max_length=arch.max_length)
    differences = compare_model(stored.to_dict(), arch.to_dict())
    if differences:
        raise UserError(f"{checkpoint.folder}: is of another model: {'; '.join(differences)}")
    adapters, wanted = from_metadata(checkpoint.metadata, checkpoint.folder), config.training.lora
    if to_metadata(adapters) != to_metadata(wanted):
        raise UserError(
            f"training.lora: {_adapters(wanted)}, {checkpoint.folder} has {_adapters(adapters)}; to change that, begin a new run "
            "(checkpoint.load, checkpoint.load_part: weights)"
        )
    there = checkpoint.tensors()
    check_stored(there, arch, adapters, checkpoint.folder)
    for part in optimizer.held():
        for kind, values in part.tensors.items():
            if (part.name, kind) not in there:
                raise UserError(
                    f"training.freeze: {part.name} was frozen in {checkpoint.folder}, so that has no moments of it; keep it "
                    "frozen, or begin a new run (checkpoint.load, checkpoint.load_part: weights)"
                )
            values.copy_(_read(checkpoint, part, kind))
    try:
        progress = _STORED.validate_json(json.dumps(checkpoint.metadata.get("progress")))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder}: does not say how far its run was ({in_words(error)})") from None
    optimizer.restored(progress.updates)
    return progress


@torch.no_grad()
def restore_weights(source: ModelSource, arch: Architecture, optimizer: ShardedOptimizer) -> None:
    """Read the weights that this rank holds; adapters stay as they were made, and the moments empty.

    Raises:
        UserError: the model has other weights; some are missing, damaged or not finite.
    """
    expected, theirs = arch.parameter_shapes(), source.architecture.parameter_shapes()
    if expected != theirs:
        name = next(name for name in [*expected, *theirs] if expected.get(name) != theirs.get(name))
        raise UserError(
            f"{source.folder}: is of another model: {name} has shape {theirs.get(name)} there, {expected.get(name)} here"
        )
    for part in optimizer.held():
        if not part.name.endswith(ADAPTERS):
            values = _read(source, part, "weight")
            if not torch.isfinite(values).all():
                raise UserError(f"{source.folder}: {part.name} has values that are not finite", mine=True)
            part.tensors["weight"].copy_(values)
    optimizer.restored(0)


def _read(source: ModelSource | Checkpoint, part: Held, kind: str) -> torch.Tensor:
    values: torch.Tensor = source.read_tensor(
        part.name,
        kind,
        offsets=part.box.offsets,
        local_shape=part.box.shape,
        flat_start=part.start,
        flat_numel=part.numel,
    )
    return values


def _adapters(lora: Lora) -> str:
    if not lora.rank:
        return "no adapters"
    return f"adapters of rank {lora.rank} and alpha {lora.alpha:g} on {', '.join(sorted(lora.targets))}"


def held_pieces(optimizer: ShardedOptimizer) -> list[tuple[PieceKey, Any]]:
    """What this rank writes: tensors in the optimizer's own memory."""
    return [piece for part in optimizer.held() for piece in _pieces(part)]


def _pieces(part: Held) -> Iterator[tuple[PieceKey, Any]]:
    """What this rank writes of ``part``: its share among those that hold the same."""
    number, count = part.holder
    first, last = (part.numel * i // count if count else 0 for i in (number, number + 1))
    if last > first:
        for kind, tensor in part.tensors.items():
            box = part.box
            key = PieceKey(part.name, kind, part.shape, box.offsets, box.shape, part.start + first, last - first)
            yield key, tensor[first:last]
