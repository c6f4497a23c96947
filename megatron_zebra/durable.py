"""Bytes and names that are on the disk when a call returns. Imports nothing of the project: every part of it writes files."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def sync(file: BinaryIO) -> None:
    """Return once the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return once the folder's entries are on the disk; file systems that cannot sync a folder are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
