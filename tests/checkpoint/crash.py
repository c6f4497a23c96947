"""A disk that stops: the file operations of ``checkpoint.files`` cut off before the k-th, as a kill or as a power loss.

After a kill everything done so far is on the disk. After a power loss, what was not synced is gone: a file's bytes without ``sync``, and
the creation, renaming or removal of an entry without ``sync_folder``: the worst that POSIX allows.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_zebra.checkpoint import files

OPERATIONS = ("make_folder", "create", "write", "sync", "sync_folder", "replace", "remove", "remove_folder")


class Killed(BaseException):
    """The process is dead; nothing of it may run on."""


class Crash:
    """Counts operations; from number ``stop`` on every one raises Killed. ``log`` names those that were done."""

    def __init__(self, stop: int | None, half_write: bool = False):
        self.stop, self.half_write = stop, half_write
        self.log: list[str] = []
        self._lock = threading.Lock()
        self._undo: list[tuple[Path, Callable[[], None]]] = []
        self._unsynced: set[Path] = set()

    def perform(self, name: str, real: Callable, args: tuple) -> object:
        with self._lock:
            if self.stop is not None and len(self.log) >= self.stop:
                if name == "write" and self.half_write and len(self.log) == self.stop:
                    real(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
                self.stop = -1
                raise Killed
            self._remember(name, args)
            result = real(*args)
            self.log.append(f"{name} {Path(getattr(args[0], 'name', args[0])).name}")
            return result

    def _remember(self, name: str, args: tuple) -> None:
        path = Path(getattr(args[0], "name", args[0])) if name in ("write", "sync") else args[0]
        if name in ("write", "create"):
            self._unsynced.add(path)
        if name == "sync":
            self._unsynced.discard(path)
        if name == "sync_folder":
            self._undo = [(parent, undo) for parent, undo in self._undo if parent != path]
        if name == "make_folder" and not path.exists():
            self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))
        if name == "create" and not path.exists():
            self._undo.append((path.parent, lambda: path.unlink(missing_ok=True)))
        if name == "replace":
            source, target = args
            if source in self._unsynced:
                self._unsynced = self._unsynced - {source} | {target}
            old, new = target.read_bytes() if target.exists() else None, source.read_bytes()
            self._undo.append((target.parent, lambda: _put(target, old) or _put(source, new)))
        if name == "remove" and path.exists():
            data = path.read_bytes()
            self._undo.append((path.parent, lambda: _put(path, data)))
        if name == "remove_folder" and path.exists() and not any(path.iterdir()):
            self._undo.append((path.parent, lambda: path.mkdir(exist_ok=True)))

    def lose_power(self) -> None:
        """Lose all that was not synced."""
        for path in self._unsynced:
            if path.exists():
                path.write_bytes(b"")
        for _, undo in reversed(self._undo):
            undo()


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    elif path.parent.exists():
        path.write_bytes(data)


@contextmanager
def crashing(stop: int | None, half_write: bool = False) -> Iterator[Crash]:
    """File operations pass through a Crash."""
    crash = Crash(stop, half_write)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            real = getattr(files, name)
            if name in ("sync", "sync_folder"):
                real = lambda path: None  # noqa: E731 (what they do to the disk is simulated)
            patch.setattr(files, name, lambda *args, name=name, real=real: crash.perform(name, real, args))
        yield crash
