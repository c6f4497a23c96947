"""A folder that comes into being whole or not at all, and values that are checked on their way into it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_zebra.checkpoint import files
from megatron_zebra.checkpoint.errors import DiskFull
from megatron_zebra.errors import UserError

CHUNK = 1 << 24  # elements looked at at once
ROOM_BESIDE = 64 * 1024 * 1024  # bytes for everything but weights


@contextlib.contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside ``target`` that gets its name when all went well, and is removed otherwise.

    Args:
        needed: bytes that will be written; DiskFull before anything is, if there is no room for them.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already; name a folder that is new or empty")
    free = files.free_bytes(target)
    if needed + ROOM_BESIDE > free:
        raise DiskFull(f"{target}: {needed + ROOM_BESIDE:,} bytes are needed, {free:,} are free")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with files.naming("writing", target):
            files.make_folder(temporary)
            yield temporary
            files.sync_folder(temporary)
            files.replace(temporary, target)
            files.sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove_tree(temporary)
        raise


def check_finite(values: torch.Tensor, name: str, where: Path) -> None:
    """Raise UserError naming the tensor if one of ``values`` [n] is not a number."""
    for part in values.split(CHUNK):
        if not torch.isfinite(part).all():
            bad = int((~torch.isfinite(part)).sum())
            raise UserError(f"{where}: {name} has values that are no finite numbers (NaN or infinity; {bad} or more)")
