"""One rank's pieces to one file, streamed; then the index, which makes a checkpoint of the files."""

import contextlib
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_zebra.checkpoint import files, layout
from megatron_zebra.checkpoint.coverage import check_cover
from megatron_zebra.checkpoint.errors import CheckpointError, DamagedCheckpoint, DiskFull
from megatron_zebra.checkpoint.layout import BLOCK_BYTES, Index, Piece, RankFile
from megatron_zebra.checkpoint.pieces import PieceKey

WRITE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Written:
    """What one rank put on the disk; sent to rank 0, which puts it into the index."""

    entry: RankFile
    bytes: int
    seconds: float


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Iterable[tuple[PieceKey, Any]],
    *,
    metadata: Mapping[str, Any] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Written:
    """Write this rank's pieces to ``folder`` and return once they are on the disk.

    ``pieces`` yields (key, 1-D numpy array or torch tensor on any device, of ``key.flat_numel`` elements) and is consumed one
    at a time, so that no second copy of the state exists. ``metadata`` is this rank's own JSON (random state, ...). A rank
    that owns nothing still calls this. On any error the rank's files are removed; DiskFull if there was no room.
    """
    began = time.perf_counter()
    data_path = folder / f"{layout.rank_stem(rank)}.bin"
    list_path = folder / f"{layout.rank_stem(rank)}.json"
    try:
        with files.naming("writing", data_path):
            files.make_folder(folder)
            with files.create(data_path) as file:
                written, size = _write_all(file, data_path.name, pieces, block_bytes)
                files.sync(file)
            text = layout.encode_pieces(written, rank, size, block_bytes, dict(metadata or {}))
            files.write_whole(list_path, text)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove(data_path)
            files.remove(list_path)
        raise
    entry = RankFile(rank, data_path.name, size, list_path.name, len(text), layout.checksum(text))
    return Written(entry, size + len(text), time.perf_counter() - began)


def _write_all(
    file: BinaryIO, name: str, pieces: Iterable[tuple[PieceKey, Any]], block_bytes: int
) -> tuple[list[Piece], int]:
    written: list[Piece] = []
    position = 0
    for key, tensor in pieces:
        problem = key.problem()
        if problem:
            raise ValueError(f"{key}: {problem}")
        array, dtype = as_bytes(tensor)
        length = key.flat_numel * layout.ITEM_BYTES[dtype]
        if len(array) != length:
            raise ValueError(f"{key}: {len(array)} bytes of {dtype} were given, {length} expected")
        padding = -position % layout.ALIGNMENT
        if padding:
            files.write(file, bytes(padding))
        position += padding
        checksums = _write_blocks(file, array.data, block_bytes)
        written.append(Piece(key, dtype, name, position, length, block_bytes, checksums))
        position += length
    return written, position


def _write_blocks(file: BinaryIO, data: memoryview, block_bytes: int) -> str:
    """Write in strides of several blocks (a call a block is slow), checksumming each block while it is in the cache."""
    sums = []
    stride = max(1, WRITE_BYTES // block_bytes) * block_bytes
    for start in range(0, len(data), stride):
        part = data[start : start + stride]
        sums += [f"{zlib.crc32(part[at : at + block_bytes]):08x}" for at in range(0, len(part), block_bytes)]
        files.write(file, part)
    return "".join(sums)


def as_bytes(tensor: Any) -> tuple[np.ndarray, str]:
    """The little-endian bytes (1-D uint8, no copy where memory allows it) of a numpy array or torch tensor, and its type's name."""
    if hasattr(tensor, "detach"):  # torch; numpy has no bfloat16, so its bytes are viewed before numpy sees them
        import torch

        dtype = str(tensor.dtype).removeprefix("torch.")
        host = tensor.detach().to("cpu").contiguous()
        host = host.as_strided((host.numel(),), (1,))  # one element of a column keeps the column's stride otherwise
        array = host.view(torch.uint8).numpy() if host.numel() else np.empty(0, np.uint8)
    else:
        host = np.ascontiguousarray(tensor).reshape(-1)
        dtype = host.dtype.name
        if dtype in layout.ITEM_BYTES and host.dtype.byteorder == ">":
            host = host.astype(host.dtype.newbyteorder("<"))
        array = host.view(np.uint8) if dtype in layout.ITEM_BYTES else np.empty(0, np.uint8)
    if dtype not in layout.ITEM_BYTES:
        raise ValueError(f"type {dtype} cannot be stored; known: {', '.join(layout.ITEM_BYTES)}")
    return array, dtype


def commit(
    folder: Path,
    step: int,
    metadata: Mapping[str, Any],
    entries: Sequence[RankFile],
    expected: Mapping[tuple[str, str], Sequence[int]] | None = None,
) -> None:
    """Write the index, by rank 0 alone, once every rank's ``write_pieces`` has returned (its entries, in rank order).

    Before that the rank files are looked at where rank 0 sees them, and all pieces together must cover every tensor exactly
    once: those of ``expected``, (name, kind) -> global shape, or else those that the pieces name. IncompleteCheckpoint names
    the tensor and interval otherwise. When this returns, the checkpoint exists and is durable.
    """
    pieces: list[Piece] = []
    for entry in entries:
        path = folder / entry.file
        try:
            with files.naming("looking at", path):
                size = path.stat().st_size
                text = (folder / entry.pieces_file).read_bytes()
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise
            raise CheckpointError(
                f"{path}: rank {entry.rank} wrote it, but rank 0 does not see it; the folder must be one that all ranks share"
            ) from error
        if size != entry.size:
            raise DamagedCheckpoint(f"{path}: {size} bytes, {entry.size} were written")
        pieces += layout.decode_pieces(text, entry, folder / entry.pieces_file)[0]
    check_types(pieces, folder)
    check_cover((piece.key for piece in pieces), expected)
    with files.naming("writing", folder / layout.INDEX):
        files.sync_folder(folder.parent)
        files.write_whole(folder / layout.INDEX, layout.encode_index(Index(step, dict(metadata), list(entries))))


def check_types(pieces: Iterable[Piece], where: Path) -> None:
    """Raise unless all pieces of a tensor have one type."""
    seen: dict[tuple[str, str], str] = {}
    for piece in pieces:
        first = seen.setdefault((piece.key.name, piece.key.kind), piece.dtype)
        if first != piece.dtype:
            raise CheckpointError(
                f"{where}: tensor {piece.key.name} ({piece.key.kind}) has pieces of {first} and {piece.dtype}"
            )


def preflight(root: Path, needed: int) -> None:
    """Raise DiskFull now, before anything is written, if ``needed`` bytes will not fit beside what is there."""
    free = files.free_bytes(root)
    if needed > free:
        raise DiskFull(f"saving to {root}: the checkpoint needs {needed:,} bytes, {free:,} are free")
