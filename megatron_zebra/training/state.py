"""What a checkpoint holds beside tensors, and how both are saved and restored."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.checkpoint.catalog import retire_newer
from megatron_zebra.checkpoint.collective import Collective
from megatron_zebra.checkpoint.describe import compare_model
from megatron_zebra.checkpoint.locate import locate
from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_zebra.checkpoint.save import Saved, save
from megatron_zebra.checkpoint.verify import find_latest_good
from megatron_zebra.config import sections
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.optimizer import KINDS, Held, ShardedOptimizer


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``data`` names the training data that ``consumed_rows`` counts in."""

    step: int = 0
    consumed_rows: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    schedule_start: int = 0
    updates: int = 0
    seed: int = 0
    data: list[str] = field(default_factory=list)


def save_state(
    root: Path,
    progress: Progress,
    arch: Architecture,
    optimizer: ShardedOptimizer,
    settings: sections.Checkpoint,
    collective: Collective,
) -> Saved:
    """Write a checkpoint of ``progress.step`` under ``root``; called by all ranks."""
    held = list(optimizer.held())
    pieces = [piece for part in held for piece in _pieces(part)]
    expected = {(name, kind): shape for name, shape in arch.parameter_shapes().items() for kind in KINDS}
    return save(
        root,
        progress.step,
        iter(pieces),
        {"architecture": arch.to_dict(), "progress": asdict(replace(progress, updates=optimizer.updates()))},
        collective=collective,
        expected=expected,
        expected_bytes=sum(key.flat_numel * 4 for key, _ in pieces),
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
    )


def resume_state(
    root: Path, arch: Architecture, optimizer: ShardedOptimizer, collective: Collective
) -> tuple[Progress | None, list[str]]:
    """Restore the newest good checkpoint under ``root``, if there is one; called by all ranks.

    Returns:
        How far it was, and a line for each newer folder that was passed over.
    """
    found = find_latest_good(root, collective)
    if found.folder is None or found.step is None:
        if found.rejected:
            # To begin anew over a damaged run would look like a resume and lose it.
            raise UserError(
                f"{root}: every checkpoint is damaged; move the folder away to begin anew ({found.skipped[0]})"
            )
        return None, found.skipped
    progress = restore(open_checkpoint(found.folder), arch, optimizer, KINDS)
    if found.skipped and collective.rank == 0:
        retire_newer(root, found.step)
    return progress, found.skipped


def start_from(
    path: Path, settings: sections.Checkpoint, arch: Architecture, optimizer: ShardedOptimizer, collective: Collective
) -> Progress:
    """Begin a new run from ``checkpoint.load``: a checkpoint's folder, a run folder, or a folder of checkpoints."""
    folder = locate(path, collective)
    if settings.load_part == "weights":
        restore(open_checkpoint(folder), arch, optimizer, ("weight",))
        optimizer.restored(0)
        return Progress()
    progress = restore(open_checkpoint(folder), arch, optimizer, KINDS)
    return replace(progress, schedule_start=progress.step) if settings.schedule == "restart" else progress


@torch.no_grad()
def restore(checkpoint: Checkpoint, arch: Architecture, optimizer: ShardedOptimizer, kinds: Iterable[str]) -> Progress:
    """Read what this rank holds of each tensor into its optimizer.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    # How long the model may be used is told to others, and changes nothing here; older checkpoints do not know NoPE.
    stored = {"nope_layers": []} | checkpoint.metadata["architecture"] | {"max_length": arch.max_length}
    differences = compare_model(stored, arch.to_dict())
    if differences:
        raise UserError(f"{checkpoint.folder}: is of another model: {'; '.join(differences)}")
    for part in optimizer.held():
        for kind in kinds:
            values = checkpoint.read_tensor(
                part.name,
                kind,
                offsets=part.box.offsets,
                local_shape=part.box.shape,
                flat_start=part.start,
                flat_numel=part.numel,
            )
            part.tensors[kind].copy_(values)
    progress = Progress(**checkpoint.metadata["progress"])
    optimizer.restored(progress.updates)
    return progress


def _pieces(part: Held) -> Iterator[tuple[PieceKey, Any]]:
    """What this rank writes of ``part``: its share among those that hold the same."""
    number, count = part.holder
    first, last = (part.numel * i // count if count else 0 for i in (number, number + 1))
    if last > first:
        for kind, tensor in part.tensors.items():
            box = part.box
            key = PieceKey(part.name, kind, part.shape, box.offsets, box.shape, part.start + first, last - first)
            yield key, tensor[first:last]
