"""A save from beginning to end, by all ranks together."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_zebra.checkpoint import catalog, files, layout
from megatron_zebra.checkpoint.collective import Alone, Collective, agree
from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.checkpoint.writer import Written, commit, preflight, write_pieces

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """What a save did: all ranks' bytes, the seconds it took, and the names of older checkpoints that went.

    ``newer`` names complete checkpoints of later steps, which an automatic resume would prefer (see ``retire_newer``).
    ``warning``: older ones could not be removed; the new one is whole all the same.
    """

    folder: Path
    step: int
    bytes: int
    seconds: float
    removed: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    warning: str | None = None

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return f"{self.folder}: {self.bytes / 1e6:,.1f} MB in {self.seconds:.2f} s ({rate:,.0f} MB/s)" + (
            f"; warning: {self.warning}" if self.warning else ""
        )


def save(
    root: Path,
    step: int,
    pieces: Iterable[tuple[PieceKey, Any]],
    metadata: Mapping[str, Any],
    *,
    collective: Collective | None = None,
    rank_metadata: Mapping[str, Any] | None = None,
    expected: Mapping[tuple[str, str], Sequence[int]] | None = None,
    expected_bytes: int = 0,
    keep_last: int | None = None,
    keep_every: int = 0,
    protect: Iterable[Path] = (),
) -> Saved:
    """Save ``step`` under ``root``; called by every rank with its own pieces. A step that is there already is replaced.

    ``metadata`` (JSON; rank 0's counts) is read back as ``Checkpoint.metadata``, ``rank_metadata`` as
    ``Checkpoint.rank_metadata(rank)``. ``expected`` (rank 0's) lists every tensor that must be there. ``expected_bytes`` is
    about what this rank will write; the sum is compared with the free space first. ``keep_last`` None removes nothing.

    Order: data files, lists of pieces, index, ``latest``, then the removal of older ones. Whatever fails on one rank is raised
    on all of them (DiskFull, IncompleteCheckpoint, ...), the new files are removed and the older checkpoints stay.
    """
    group = collective or Alone()
    root, began = Path(root), time.perf_counter()
    needed = sum(group.all_gather(expected_bytes))
    protect = list(protect)
    folder = _by_rank_0(group, lambda: _begin(root, step, needed, keep_last, keep_every, protect))
    try:
        written = _by_all(group, lambda: write_pieces(folder, group.rank, pieces, metadata=rank_metadata))
        _by_rank_0(group, lambda: commit(folder, step, metadata, [w.entry for w in written], expected))
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # storage that is away keeps its half-written folder, which a later save removes
            if group.rank == 0 and not (folder / layout.INDEX).exists():
                files.remove_tree(folder)
        raise
    removed, newer, warning = _by_rank_0(group, lambda: _finish(root, step, folder, keep_last, keep_every, protect))
    total = sum(w.bytes for w in written)
    return Saved(folder, step, total, time.perf_counter() - began, removed, newer, warning)


def _begin(root: Path, step: int, needed: int, keep_last: int | None, keep_every: int, protect: Iterable[Path]) -> Path:
    with files.naming("saving to", root):
        files.make_folder(root)
        files.sync_folder(root.parent)
        folder = catalog.new_folder(root, step)
        if keep_last is not None:
            with contextlib.suppress(OSError):  # the end of this save tells what cannot be removed
                catalog.settle(root, keep_last, keep_every, protect)
        preflight(root, needed)
        files.make_folder(folder)
    return folder


def _finish(
    root: Path, step: int, folder: Path, keep_last: int | None, keep_every: int, protect: Iterable[Path]
) -> tuple[list[str], list[str], str | None]:
    with files.naming("writing", root / catalog.LATEST):
        catalog.write_latest(root, folder)
        found = catalog.entries(root)
    newer = [entry.folder.name for entry in found if entry.complete and entry.step > step]
    removed: list[str] = []
    try:
        for entry in found:
            if entry.step == step and entry.folder.name != folder.name:
                catalog.remove_checkpoint(entry.folder)
                removed.append(entry.folder.name)
        if keep_last is not None:
            removed += catalog.prune(root, keep_last, keep_every, [folder, *protect])
    except OSError as error:
        return removed, newer, f"{error.filename or root}: {error.strerror}; older checkpoints stay"
    return removed, newer, None


def _by_all(group: Collective, act: Callable[[], Written]) -> list[Written]:
    """Everybody's results, or an error on all if it failed on one."""
    result: Written | None = None
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    agree(group, failure)
    return group.all_gather(result)


def _by_rank_0(group: Collective, act: Callable[[], T]) -> T:
    """Rank 0 acts; everybody gets its result, or its error."""
    result: T | None = None
    failure: Exception | None = None
    if group.rank == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    agree(group, failure)
    return group.all_gather(result)[0]
