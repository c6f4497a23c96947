"""The few file operations a save is made of, each durable when it says so.

Everything that changes the disk passes through here, in the order in which it happens: tests stop a save before any one of
these calls. Callers use ``files.name(...)``, so that a replacement is seen.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_zebra.checkpoint.errors import CheckpointError, DiskFull, NotTaken
from megatron_zebra.durable import sync, sync_folder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)  # what a network's file system says while its server cannot be reached


def make_folder(path: Path) -> None:
    """Create a folder (and its parents); it may be there already."""
    path.mkdir(parents=True, exist_ok=True)


def create(path: Path) -> BinaryIO:
    """Open a new or emptied file for unbuffered writing."""
    return open(path, "wb", buffering=0)


def write(file: BinaryIO, data: memoryview | bytes) -> None:
    """Write all of ``data``: a raw write may take less."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def replace(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``, atomically."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file; it may be gone already."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder; it may be gone, or somebody may have put something in it."""
    with contextlib.suppress(FileNotFoundError, OSError):
        path.rmdir()


def write_whole(path: Path, data: bytes) -> None:
    """Put a small file in place so that under ``path`` there is the old one or all of the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with create(temporary) as file:
            write(file, data)
            sync(file)
        replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; parts that another process removes at the same time are no error."""
    for child in entries(path):
        if child.is_dir() and not child.is_symlink():
            remove_tree(child)
        else:
            remove(child)
    remove_folder(path)


def entries(path: Path) -> list[Path]:
    """What a folder holds, sorted; empty if there is no such folder."""
    try:
        return sorted(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def lines(path: Path) -> list[str]:
    """The lines of a small text file; none if there is no such file, or no text in it."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write on the file system that holds ``path`` or would hold it."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    info = os.statvfs(place)
    return info.f_bavail * info.f_frsize


@contextlib.contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turn the system's complaint about a full or failing disk or a forbidden path into one line of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"{action} {path}: {error.strerror} ({free_bytes(path):,} bytes free)") from error
        kind = NotTaken if error.errno in AWAY else CheckpointError
        raise kind(f"{action} {error.filename or path}: {error.strerror or error}") from error
