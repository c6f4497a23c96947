"""Is a checkpoint whole? And which is the newest that is, found by all ranks alike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_zebra.checkpoint import catalog, layout
from megatron_zebra.checkpoint.blocks import READ_BYTES, opened, read_span
from megatron_zebra.checkpoint.collective import Alone, Collective, agree
from megatron_zebra.checkpoint.errors import CheckpointError, OtherFormat
from megatron_zebra.checkpoint.layout import Piece
from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint

MOST_PROBLEMS = 20


def verify(
    folder: Path | str, rank: int = 0, world_size: int = 1, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Problems of a checkpoint, one line each naming the file; empty if it is whole. Never raises about the checkpoint.

    Every rank checks index, lists of pieces, coverage, and the presence and size of all files; the data's checksums are shared
    out by bytes, so that the ranks together read each byte once. ``progress`` is called with the number of bytes just checked.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return [str(error)]
    return _check_data(checkpoint, rank, world_size, progress)


def _check_data(
    checkpoint: Checkpoint, rank: int, world_size: int, progress: Callable[[int], None] | None
) -> list[str]:
    bad = _check_files(checkpoint)
    problems = list(bad.values())
    total = sum(p.byte_length for tensor in checkpoint.tensors() for p in checkpoint.pieces(*tensor))
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for piece, start, stop in _share(checkpoint, first, last):
        path = checkpoint.folder / piece.file
        if piece.file in bad:
            continue
        try:
            _check_blocks(path, checkpoint, piece, start, stop, progress)
        except CheckpointError as error:
            problems.append(str(error))
        if len(problems) >= MOST_PROBLEMS:
            problems.append(f"{checkpoint.folder}: the rest was not looked at")
            break
    return problems


def _check_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Data file -> what is wrong with its presence or size."""
    problems = {}
    for name, size in checkpoint.file_sizes().items():
        try:
            with opened(checkpoint.folder / name, size):
                pass
        except CheckpointError as error:
            problems[name] = str(error)
    return problems


def _share(checkpoint: Checkpoint, first: int, last: int) -> list[tuple[Piece, int, int]]:
    """(piece, start, stop): the blocks that begin within bytes ``first`` to ``last`` of all pieces laid end to end, file by file."""
    pieces = [p for tensor in checkpoint.tensors() for p in checkpoint.pieces(*tensor)]
    pieces.sort(key=lambda p: (p.file, p.byte_offset))
    share, before = [], 0
    for piece in pieces:
        edges = [max(0, edge - before) for edge in (first, last)]
        start, stop = (min(piece.byte_length, -(-edge // piece.block_bytes) * piece.block_bytes) for edge in edges)
        if start < stop:
            share.append((piece, start, stop))
        before += piece.byte_length
    return share


def _check_blocks(
    path: Path, checkpoint: Checkpoint, piece: Piece, start: int, stop: int, progress: Callable[[int], None] | None
) -> None:
    step = max(1, READ_BYTES // piece.block_bytes) * piece.block_bytes
    buffer = memoryview(bytearray(min(step, stop - start)))
    with opened(path, checkpoint.file_sizes()[piece.file], piece) as file:
        for at in range(start, stop, step):
            view = buffer[: min(step, stop - at)]
            read_span(file, path, piece, at, view)
            if progress:
                progress(len(view))


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint (None: there is none), and one line for each newer folder that was passed over.

    ``rejected`` of those were complete and are damaged; the others are half-written or set aside. With ``folder`` None and
    something rejected, starting from nothing would be to give up a run: that is for the user to decide.
    """

    folder: Path | None
    step: int | None
    skipped: list[str]
    rejected: int = 0


def find_latest_good(
    root: Path | str, collective: Collective | None = None, *, deep: bool = True, max_step: int | None = None
) -> Found:
    """The newest checkpoint under ``root`` in which no rank finds a problem; called by all ranks, same answer on all.

    Newest is by step and revision of the folders that have an index, whatever ``latest`` says: the index is the last thing
    written before a checkpoint is durable, so one that ``latest`` does not name yet is as good. ``deep`` checks all data,
    shared out over the ranks; without it only lists and sizes are checked (reading checks what it reads in any case).
    ``max_step`` passes over later steps. OtherFormat is raised on all ranks for a checkpoint of another format version.
    """
    group = collective or Alone()
    failure: Exception | None = None
    candidates: list[catalog.Entry] = []
    if group.rank == 0:
        try:
            candidates = [e for e in reversed(catalog.entries(Path(root))) if max_step is None or e.step <= max_step]
        except OSError as error:
            failure = CheckpointError(f"{root}: {error.strerror}")
    agree(group, failure)
    skipped: list[str] = []
    rejected = 0
    for entry in group.all_gather(candidates)[0]:
        if not entry.complete:
            retired = (entry.folder / catalog.RETIRED).exists()
            why = "set aside earlier" if retired else f"no {layout.INDEX}: half-written"
            skipped.append(f"{entry.folder.name} skipped: {entry.folder}: {why}")
            continue
        problems = _problems(entry.folder, group, deep)
        if not problems:
            return Found(entry.folder, entry.step, skipped, rejected)
        rejected += 1
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{entry.folder.name} skipped: {problems[0]}{more}")
    return Found(None, None, skipped, rejected)


def _problems(folder: Path, group: Collective, deep: bool) -> list[str]:
    """All ranks' problems, each once."""
    other_format: OtherFormat | None = None
    try:
        checkpoint = open_checkpoint(folder)
        mine = _check_data(checkpoint, group.rank, group.world_size, None) if deep else _shallow(checkpoint)
    except OtherFormat as error:
        other_format, mine = error, []
    except CheckpointError as error:
        mine = [str(error)]
    except Exception as error:  # whatever it is, the others must not wait for this rank
        mine = [f"{folder}: {type(error).__name__}: {error}"]
    agree(group, other_format)
    return list(dict.fromkeys(line for lines in group.all_gather(mine) for line in lines))


def _shallow(checkpoint: Checkpoint) -> list[str]:
    return list(_check_files(checkpoint).values())
