"""The checkpoint that a user means by a path, and the run it belongs to."""

from pathlib import Path

from megatron_zebra.checkpoint import layout
from megatron_zebra.checkpoint.collective import Collective
from megatron_zebra.checkpoint.verify import find_latest_good
from megatron_zebra.errors import UserError


def locate(path: Path, collective: Collective | None = None) -> Path:
    """The newest good checkpoint at ``path``: itself, or below it; called by all processes of ``collective``."""
    if (path / layout.INDEX).is_file():
        return path
    for root in (path / "checkpoints", path):
        if root.is_dir():
            found = find_latest_good(root, collective)
            if found.folder is not None:
                return found.folder
            if found.skipped:
                raise UserError(f"{path}: holds no good checkpoint ({found.skipped[0]})")
    raise UserError(f"{path}: holds no checkpoint (a run folder, or a folder with index.json, is needed)")


def run_of(checkpoint: Path) -> Path | None:
    """The run in whose folder of checkpoints it lies: as it is named, or, where that does not tell (it is named from within
    the run), as it is; None for any other folder."""
    named = (path for path in (checkpoint, checkpoint.resolve()) if path.parent.name == "checkpoints")
    return next((path.parent.parent for path in named), None)
