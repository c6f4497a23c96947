"""The layout-free checkpoint store: save under any layout, load under any other, never half a checkpoint."""

from megatron_zebra.checkpoint.catalog import newest, prune, retire_newer
from megatron_zebra.checkpoint.collective import Alone, Collective
from megatron_zebra.checkpoint.describe import compare_model, describe
from megatron_zebra.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    DiskFull,
    IncompleteCheckpoint,
    NotTaken,
    OtherFormat,
)
from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_zebra.checkpoint.save import Saved, save
from megatron_zebra.checkpoint.verify import Found, find_latest_good, verify
from megatron_zebra.checkpoint.writer import commit, preflight, write_pieces

__all__ = [
    "Alone",
    "Checkpoint",
    "CheckpointError",
    "Collective",
    "DamagedCheckpoint",
    "DiskFull",
    "Found",
    "IncompleteCheckpoint",
    "NotTaken",
    "OtherFormat",
    "PieceKey",
    "Saved",
    "commit",
    "compare_model",
    "describe",
    "find_latest_good",
    "newest",
    "open_checkpoint",
    "preflight",
    "prune",
    "retire_newer",
    "save",
    "verify",
    "write_pieces",
]
