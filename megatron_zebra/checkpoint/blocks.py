"""Bytes of a piece from its file, checked block by block before anybody sees them."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_zebra.checkpoint.errors import DamagedCheckpoint
from megatron_zebra.checkpoint.layout import Piece

READ_BYTES = 4 * 1024 * 1024


@contextmanager
def opened(path: Path, size: int, piece: Piece | None = None) -> Iterator[BinaryIO]:
    """The file, unbuffered; DamagedCheckpoint if it is not there or not ``size`` bytes long, naming ``piece`` as what is lost."""
    lost = f"; it holds {piece.key}" if piece else ""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed below; only opening it may fail like this)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}{lost}") from error
    with file:
        actual = file.seek(0, 2)
        if actual != size:
            raise DamagedCheckpoint(f"{path}: {actual} bytes, {size} expected{lost}")
        yield file


def read_span(file: BinaryIO, path: Path, piece: Piece, start: int, out: memoryview, check: bool = True) -> int:
    """Fill ``out`` with the piece's bytes from ``start``; return how many bytes were read.

    With ``check`` whole blocks are read and their checksums compared: a block that sticks out of the span at either end is
    read into a buffer of its own, all others straight into ``out``.
    """
    if not check:
        _fill(file, path, piece, start, out)
        return len(out)
    block, stop, at, total = piece.block_bytes, start + len(out), start, 0
    while at < stop:
        first = at // block * block
        whole = min(stop if stop == piece.byte_length else stop // block * block, at + READ_BYTES)
        whole = whole if whole == piece.byte_length else whole // block * block
        if first == at and whole > at:
            view = out[at - start : whole - start]
            _fill(file, path, piece, at, view)
            _check(path, piece, at, view)
            total += len(view)
            at = whole
        else:
            edge = memoryview(bytearray(min(block, piece.byte_length - first)))
            _fill(file, path, piece, first, edge)
            _check(path, piece, first, edge)
            total += len(edge)
            end = min(stop, first + len(edge))
            out[at - start : end - start] = edge[at - first : end - first]
            at = end
    return total


def _fill(file: BinaryIO, path: Path, piece: Piece, start: int, out: memoryview) -> None:
    position = piece.byte_offset + start
    try:
        file.seek(position)
        while out:
            count = file.readinto(out)  # type: ignore[attr-defined]
            if not count:
                raise DamagedCheckpoint(f"{path}: ends at byte {file.tell()} within {piece.key}")
            out = out[count:]
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror} at byte {position}, {piece.key}") from error


def _check(path: Path, piece: Piece, start: int, data: memoryview) -> None:
    """Compare the checksums of the blocks that ``data``, which starts at a block's edge, consists of."""
    block = piece.block_bytes
    for at in range(0, len(data), block):
        actual = f"{zlib.crc32(data[at : at + block]):08x}"
        digit = (start + at) // block * 8
        expected = piece.checksums[digit : digit + 8]
        if actual != expected:
            place = piece.byte_offset + start + at
            raise DamagedCheckpoint(
                f"{path}: checksum {actual}, expected {expected}, in the {min(block, len(data) - at)} bytes at {place}; {piece.key}"
            )
