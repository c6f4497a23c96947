"""What lies in a checkpoint folder: names, the rank files' list of pieces, the index. Encoding, and decoding that trusts nothing.

step-00000010/rank-00000.bin     pieces' raw little-endian bytes, each aligned to 64
              rank-00000.json    where each piece lies, with a crc32 of every ``block_bytes`` of it
              index.json         step, metadata, size and checksum of every rank's files; without it there is no checkpoint
"""

import json
import zlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint.errors import CheckpointError, DamagedCheckpoint, OtherFormat
from megatron_zebra.checkpoint.pieces import PieceKey

FORMAT = 1
INDEX = "index.json"
ALIGNMENT = 64
BLOCK_BYTES = 128 * 1024

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip


def rank_stem(rank: int) -> str:
    """Name of a rank's two files, without the ending."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True)
class Piece:
    """A piece that was written: its key, its type and where its bytes are.

    ``checksums`` is a crc32 (8 hexadecimal digits) of every ``block_bytes`` of the piece, so that a part can be checked alone.
    """

    key: PieceKey
    dtype: str
    file: str
    byte_offset: int
    byte_length: int
    block_bytes: int
    checksums: str


@dataclass(frozen=True)
class RankFile:
    """One rank's entry in the index: its data file and the checksum of its list of pieces."""

    rank: int
    file: str
    size: int
    pieces_file: str
    pieces_size: int
    pieces_checksum: str


@dataclass(frozen=True)
class Index:
    """The content of index.json. ``metadata`` is whatever the saver gave; ``latest`` may lag behind, the index does not."""

    step: int
    metadata: dict[str, Any]
    ranks: list[RankFile] = field(default_factory=list)


def checksum(data: bytes | memoryview) -> str:
    """crc32 as 8 hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def encode_pieces(pieces: list[Piece], rank: int, size: int, block_bytes: int, metadata: dict[str, Any]) -> bytes:
    """The text of a rank's .json."""
    listed = [
        {
            "name": p.key.name,
            "kind": p.key.kind,
            "global_shape": p.key.global_shape,
            "offsets": p.key.offsets,
            "local_shape": p.key.local_shape,
            "flat_start": p.key.flat_start,
            "flat_numel": p.key.flat_numel,
            "dtype": p.dtype,
            "byte_offset": p.byte_offset,
            "byte_length": p.byte_length,
            "checksums": p.checksums,
        }
        for p in pieces
    ]
    head = {"format": FORMAT, "rank": rank, "file": f"{rank_stem(rank)}.bin", "size": size, "block_bytes": block_bytes}
    return encode({**head, "metadata": metadata, "pieces": listed})


def decode_pieces(data: bytes, entry: RankFile, where: Path) -> tuple[list[Piece], dict[str, Any]]:
    """A rank's pieces and its own metadata; DamagedCheckpoint or CheckpointError naming ``where`` for anything unexpected."""
    if len(data) != entry.pieces_size or checksum(data) != entry.pieces_checksum:
        raise DamagedCheckpoint(
            f"{where}: {len(data)} bytes with checksum {checksum(data)}, "
            f"the index expects {entry.pieces_size} with {entry.pieces_checksum}"
        )
    document = decode(data, where)
    _check_format(document, where)
    try:
        block_bytes = _natural(document["block_bytes"], least=1)
        pieces = [_piece(item, entry, block_bytes) for item in document["pieces"]]
        metadata = document["metadata"]
        if not isinstance(metadata, dict):
            raise ValueError("metadata is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{where}: not a list of pieces ({_reason(error)})") from error
    return pieces, metadata


def _piece(item: dict[str, Any], entry: RankFile, block_bytes: int) -> Piece:
    key = PieceKey(
        _text(item["name"]),
        _text(item["kind"]),
        _shape(item["global_shape"]),
        _shape(item["offsets"]),
        _shape(item["local_shape"]),
        _natural(item["flat_start"]),
        _natural(item["flat_numel"]),
    )
    problem = key.problem()
    if problem:
        raise ValueError(problem)
    dtype = _text(item["dtype"])
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown type {dtype!r} of {key.name}")
    offset, length = _natural(item["byte_offset"]), _natural(item["byte_length"])
    if length != key.flat_numel * ITEM_BYTES[dtype] or offset + length > entry.size:
        raise ValueError(f"{key}: {length} bytes at {offset} do not fit")
    checksums = _text(item["checksums"])
    if len(checksums) != 8 * -(-length // block_bytes):
        raise ValueError(f"{key}: checksums for another length")
    return Piece(key, dtype, entry.file, offset, length, block_bytes, checksums)


def encode_index(index: Index) -> bytes:
    """The text of index.json, with a checksum of everything else in it."""
    body = {
        "format": FORMAT,
        "step": index.step,
        "metadata": index.metadata,
        "ranks": [vars(entry) for entry in index.ranks],
    }
    body = json.loads(json.dumps(body))  # keys that are no text sort otherwise once they are
    return encode({**body, "checksum": checksum(_canonical(body))}, indent=1)


def read_index(folder: Path) -> Index:
    """Read and check index.json of ``folder``."""
    where = folder / INDEX
    try:
        data = where.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder") from error
        raise DamagedCheckpoint(f"{folder}: no {INDEX}: half-written, or not a checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from error
    document = decode(data, where)
    expected = document.pop("checksum", None)
    actual = checksum(_canonical(document))
    if expected != actual:  # how this is computed outlives format versions: an unknown one is no damage
        raise DamagedCheckpoint(f"{where}: checksum {actual}, expected {str(expected)[:40]}")
    _check_format(document, where)
    try:
        ranks = [_rank_file(item, rank) for rank, item in enumerate(document["ranks"])]
        metadata = document["metadata"]
        if not isinstance(metadata, dict) or not ranks:
            raise ValueError("metadata or ranks are missing")
        return Index(_natural(document["step"]), metadata, ranks)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{where}: not an index ({_reason(error)})") from error


def _rank_file(item: dict[str, Any], rank: int) -> RankFile:
    entry = RankFile(
        _natural(item["rank"]),
        _text(item["file"]),
        _natural(item["size"]),
        _text(item["pieces_file"]),
        _natural(item["pieces_size"]),
        _text(item["pieces_checksum"]),
    )
    if (entry.rank, entry.file, entry.pieces_file) != (rank, f"{rank_stem(rank)}.bin", f"{rank_stem(rank)}.json"):
        raise ValueError(f"entry {rank} names rank {entry.rank}, {entry.file}, {entry.pieces_file}")
    return entry


def encode(document: dict[str, Any], indent: int | None = None) -> bytes:
    """JSON as UTF-8."""
    separators = None if indent else (",", ":")
    return (json.dumps(document, indent=indent, separators=separators) + "\n").encode()


def decode(data: bytes, where: Path) -> dict[str, Any]:
    """A JSON object, or DamagedCheckpoint naming the file."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: not JSON ({_reason(error)})") from error
    if not isinstance(document, dict):
        raise DamagedCheckpoint(f"{where}: a JSON object was expected")
    return document


def _canonical(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"not plain JSON ({_reason(error)})") from error


def _check_format(document: dict[str, Any], where: Path) -> None:
    found = document.get("format")
    if found != FORMAT or isinstance(found, bool):
        shown = repr(found)[:40]
        raise OtherFormat(f"{where}: format version {shown}, this program reads {FORMAT}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text was expected")
    return value


def _natural(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise ValueError(f"a whole number from {least} was expected, not {repr(value)[:40]}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32:
        raise TypeError("a list of sizes was expected")
    shape = tuple(map(_natural, value))
    if prod(shape) >= 2**62:
        raise ValueError(f"impossible shape {list(shape)}")
    return shape


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return f"missing key {text}" if isinstance(error, KeyError) else text or type(error).__name__
