"""The folder that holds a run's checkpoints: which there are, which is newest, which go.

A checkpoint of step 10 lies in ``step-00000010``; one that replaces it, in ``step-00000010.1``, and the older goes once the
newer has its index, so that there is no moment without a valid one. The newest is the one with an index and the highest
(step, revision). ``latest`` names it for people and other programs; it is written after the index, so after a crash between
the two it may name the one before. That is never an error, and nothing here reads it to decide anything.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_zebra.checkpoint import files, layout

LATEST = "latest"
RETIRED = "index.retired.json"
_NAME = re.compile(r"step-(\d{8,18})(?:\.([1-9]\d{0,8}))?")


@dataclass(frozen=True, order=True)
class Entry:
    """A folder named like a checkpoint. ``complete``: its index exists (it may still be damaged)."""

    step: int
    revision: int
    folder: Path
    complete: bool


def entries(root: Path) -> list[Entry]:
    """All folders named like checkpoints, oldest first."""
    names = [path.name for path in files.entries(root) if path.is_dir()]
    return parsed(root, names, lambda name: (root / name / layout.INDEX).is_file())


def parsed(root: Path, names: Iterable[str], complete: Callable[[str], bool]) -> list[Entry]:
    """Those of ``names`` under ``root`` that are named like checkpoints, oldest first."""
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            found.append(Entry(int(match[1]), int(match[2] or 0), root / name, complete(name)))
    return sorted(found)


def newest(root: Path) -> Path | None:
    """The newest checkpoint that has an index, unverified; None if there is none."""
    complete = [entry.folder for entry in entries(root) if entry.complete]
    return complete[-1] if complete else None


def folder_name(step: int, revision: int = 0) -> str:
    return f"step-{step:08d}" + (f".{revision}" if revision else "")


def new_folder(root: Path, step: int) -> Path:
    """The folder in which to save ``step``: half-written ones of that step are cleared away, a complete one is left alone."""
    same = [entry for entry in entries(root) if entry.step == step]
    for entry in same:
        if not entry.complete:
            files.remove_tree(entry.folder)
    complete = [entry.revision for entry in same if entry.complete]
    return root / folder_name(step, max(complete) + 1 if complete else 0)


def write_latest(root: Path, folder: Path) -> None:
    """Let ``latest`` name ``folder``; the last act of a save."""
    files.write_whole(root / LATEST, f"{folder.name}\n".encode())


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its index first: if this stops half-way, what is left is not a checkpoint."""
    files.remove(folder / layout.INDEX)
    files.sync_folder(folder)
    files.remove_tree(folder)


def retire_newer(root: Path, step: int) -> list[str]:
    """Take the checkpoints after ``step`` out of the line, when a run goes on from ``step`` on purpose (or because they are damaged).

    Otherwise the next automatic resume would take one of them for the newest. Their index gets another name, and ``prune``
    removes them once the run has passed their step again. Returns their names.
    """
    with files.naming("setting aside checkpoints in", root):
        complete = [entry for entry in entries(root) if entry.complete]
        later = [entry for entry in complete if entry.step > step]
        if later and len(later) < len(complete):
            write_latest(root, complete[len(complete) - len(later) - 1].folder)
        for entry in later:
            files.replace(entry.folder / layout.INDEX, entry.folder / RETIRED)
            files.sync_folder(entry.folder)
    return [entry.folder.name for entry in later]


def prune(root: Path, keep_last: int, keep_every: int = 0, protect: Iterable[Path] = ()) -> list[str]:
    """Remove old checkpoints and the remains of saves that did not finish; by rank 0, while no save is under way.

    Kept: the ``keep_last`` (at least 1) newest, all of a step that ``keep_every`` divides (0: none), and those of ``protect`` (the one just written,
    the one resumed from). An older revision of a step goes once a newer one is complete. Returns the names of what was removed.
    """
    protected = {path.name for path in protect}
    removed = []
    found = entries(root)
    newest_step = max((entry.step for entry in found if entry.complete), default=-1)
    for entry in outlived(found, keep_last, keep_every):
        name = entry.folder.name
        retired = not entry.complete and (entry.folder / RETIRED).exists()
        if name in protected or (retired and entry.step > newest_step):
            continue
        remove_checkpoint(entry.folder)
        removed.append(name)
    return removed


def settle(root: Path, keep_last: int, keep_every: int = 0, protect: Iterable[Path] = ()) -> None:
    """Do what is left of a save that was stopped, or found no room, after its index: older ones go, ``latest`` names the newest.

    Else the room of those that go at the end of a save would be missing at the beginning of each later one.
    """
    last, protected = newest(root), list(protect)
    named = [root / line for line in files.lines(root / LATEST)]
    prune(root, keep_last, keep_every, [*protected, *named])  # first, since even ``latest`` takes room
    if last is not None and named != [last]:
        write_latest(root, last)
        prune(root, keep_last, keep_every, protected)


def outlived(found: list[Entry], keep_last: int, keep_every: int) -> list[Entry]:
    """Of ``found``, in order, those that ``prune`` has no reason to keep."""
    latest_revision = {entry.step: entry for entry in found if entry.complete}
    last = list(latest_revision.values())[-max(1, keep_last) :]
    by_step = [entry for entry in latest_revision.values() if keep_every > 0 and entry.step % keep_every == 0]
    return [entry for entry in found if entry not in last and entry not in by_step]
