"""Packed rows on disk: built once, by whichever process comes first, and memory-mapped by all.

No rank has a role in this. A process that does not find the file tries to take a lock beside it, and builds it when it
has the lock; the others wait for the file. So every node with disks of its own builds one, a shared folder gets one, and
a builder that is killed hands the lock to the next. Where the file system knows no locks each builds it for itself. The
content depends on nothing but the name, and a file under its final name is complete and is never written again.
"""

import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_zebra.data.packing import RowTable
from megatron_zebra.durable import sync, sync_folder
from megatron_zebra.errors import UserError

log = logging.getLogger(__name__)
_MAGIC = b"ZEBRAROW"
_HEADER = struct.Struct("<8sQQQQ")  # magic, rows, pieces, tokens, documents; then the arrays of RowTable
_POLL = 0.05  # seconds between looks for the file


def load_or_build(path: Path, build: Callable[[], RowTable], timeout: float = 3600.0) -> RowTable:
    """The table of this file, built first if it is not there. UserError where it cannot be, or after ``timeout`` seconds."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / f"{path.name}.lock").open("ab") as lock:
                _build_or_wait(path, lock.fileno(), build, timeout)
        except OSError as error:
            raise UserError(
                f"{path}: the index of packed rows cannot be written ({error.strerror}); set data.cache_dir to a folder "
                "with room that can be written"
            ) from None
    return _read(path)


def _build_or_wait(path: Path, lock: int, build: Callable[[], RowTable], timeout: float) -> None:
    start = time.monotonic()
    told = False
    while not path.exists():
        taken = _try_lock(lock)
        if taken is not False:
            if not path.exists():  # it may have come between the two looks
                log.info("packing documents into rows: %s", path)
                _write(path, build(), alone=taken is True)
            return
        waited = time.monotonic() - start
        if waited > timeout:
            raise UserError(
                f"{path}: waited {waited:.0f} s for another process to pack the documents; look whether it hangs, or set "
                "data.cache_dir to another folder"
            )
        if waited > 5 and not told:
            told = True
            log.warning("waiting for another process that packs documents into rows: %s", path)
        time.sleep(_POLL)


def _try_lock(descriptor: int) -> bool | None:
    """True: the lock is ours until the file is closed. False: another has it. None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _write(path: Path, table: RowTable, alone: bool) -> None:
    """Under a temporary name, to the disk, and only then to its own name, unless another was quicker."""
    owner = "" if alone else f".{socket.gethostname()}.{os.getpid()}"  # with the lock, what a killed one left is reused
    temporary = path.with_name(f"{path.name}{owner}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, table.rows, table.starts.size, table.tokens, table.documents))
            for array, kind in ((table.offsets, "<i8"), (table.starts, "<i8"), (table.lengths, "<i4")):
                stream.write(array.astype(kind, copy=False).tobytes())
            sync(stream)
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _read(path: Path) -> RowTable:
    try:
        raw = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the index of packed rows cannot be read ({error})") from None
    if raw.size < _HEADER.size or bytes(raw[:8]) != _MAGIC:
        raise UserError(f"{path}: not an index of packed rows; delete it, and it is built anew")
    _, rows, pieces, tokens, documents = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    edges = np.cumsum([_HEADER.size, 8 * (rows + 1), 8 * pieces, 4 * pieces])
    if raw.size != edges[-1]:
        raise UserError(f"{path}: {raw.size} bytes instead of {edges[-1]}; delete it, and it is built anew")
    offsets, starts, lengths = (raw[edges[n] : edges[n + 1]].view(kind) for n, kind in enumerate(("<i8", "<i8", "<i4")))
    return RowTable(offsets, starts, lengths, tokens, documents)
