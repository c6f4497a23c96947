"""Any interval of any box of any tensor, from whatever pieces hold it, reading little more than those elements."""

import threading
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_zebra.checkpoint import layout
from megatron_zebra.checkpoint.blocks import opened, read_span
from megatron_zebra.checkpoint.coverage import check_cover, tensor_defect
from megatron_zebra.checkpoint.errors import DamagedCheckpoint, IncompleteCheckpoint
from megatron_zebra.checkpoint.layout import Index, Piece
from megatron_zebra.checkpoint.pieces import Copy, PieceKey, Shape, copies, strides
from megatron_zebra.checkpoint.writer import check_types

SCRATCH_BYTES = 4 * 1024 * 1024
HOLE_BYTES = 16 * 1024  # reading over a smaller hole is cheaper than another read
_BITS = {"bfloat16": "uint16"}  # numpy lacks these types: their bits, as whole numbers; the float8 ones as uint8


class Checkpoint:
    """An open checkpoint. Safe to use from several threads; holds no file open between reads.

    ``step``, ``metadata`` (as given to save), ``world_size`` (ranks that wrote it), ``bytes_read`` (from data files, so far).
    """

    def __init__(
        self, folder: Path, index: Index, pieces: list[Piece], rank_metadata: list[dict[str, Any]], check: bool
    ):
        self.folder, self.step, self.metadata = folder, index.step, index.metadata
        self.world_size = len(index.ranks)
        self.bytes_read = 0
        self._check = check
        self._rank_metadata = rank_metadata
        self._sizes = {entry.file: entry.size for entry in index.ranks}
        self._lock = threading.Lock()
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        for piece in pieces:
            self._pieces[piece.key.name, piece.key.kind].append(piece)

    def tensors(self) -> dict[tuple[str, str], Shape]:
        """(name, kind) -> global shape, of everything stored."""
        return {tensor: pieces[0].key.global_shape for tensor, pieces in self._pieces.items()}

    def names(self, kind: str = "weight") -> list[str]:
        """Names of the tensors stored under ``kind``."""
        return sorted(name for name, stored in self._pieces if stored == kind)

    def kinds(self) -> list[str]:
        return sorted({kind for _, kind in self._pieces})

    def shape(self, name: str, kind: str = "weight") -> Shape:
        """Global shape; IncompleteCheckpoint if there is no such tensor."""
        return self._stored(name, kind)[0].key.global_shape

    def dtype(self, name: str, kind: str = "weight") -> str:
        """Stored type, as torch and numpy name it ("float32", "bfloat16", ...)."""
        return self._stored(name, kind)[0].dtype

    def pieces(self, name: str, kind: str = "weight") -> list[Piece]:
        """Where the tensor's pieces lie."""
        return list(self._stored(name, kind))

    def file_sizes(self) -> dict[str, int]:
        """Data file -> its size in bytes."""
        return self._sizes

    def rank_metadata(self, rank: int) -> dict[str, Any]:
        """What that rank saved for itself; empty if so many ranks did not write this checkpoint."""
        return self._rank_metadata[rank] if 0 <= rank < self.world_size else {}

    def read(
        self,
        name: str,
        kind: str = "weight",
        offsets: Shape | None = None,
        local_shape: Shape | None = None,
        flat_start: int = 0,
        flat_numel: int | None = None,
    ) -> np.ndarray:
        """Elements ``[flat_start, flat_start + flat_numel)`` of the box ``offsets .. offsets + local_shape``, row-major, 1-D.

        Default: all of the box, and the whole tensor as the box. Every byte is checked before anything is returned. Types
        that numpy lacks come as the unsigned whole numbers of their bits (``read_tensor`` gives them their type).
        Raises DamagedCheckpoint (a file is missing, cut or altered), IncompleteCheckpoint (no such tensor or elements), or
        ValueError (a box or interval that the tensor does not have).
        """
        stored = self._stored(name, kind)
        shape = stored[0].key.global_shape
        offsets = tuple(offsets) if offsets is not None else (0,) * len(shape)
        local = tuple(local_shape) if local_shape is not None else tuple(n - o for n, o in zip(shape, offsets))
        numel = prod(local) - flat_start if flat_numel is None else flat_numel
        target = PieceKey(name, kind, shape, offsets, local, flat_start, numel)
        problem = target.problem()
        if problem:
            raise ValueError(f"{self.folder}: {name} ({kind}): {problem}")
        out = np.empty(numel, _numpy_type(stored[0].dtype))
        needed: dict[str, list[tuple[Piece, Copy]]] = defaultdict(list)
        for piece in stored:
            for copy in copies(piece.key, target):
                needed[piece.file].append((piece, copy))
        if sum(copy.numel for parts in needed.values() for _, copy in parts) != numel:
            raise IncompleteCheckpoint(f"{self.folder}: {target}: {tensor_defect([p.key for p in stored])}")
        total = 0
        for name_of_file, parts in needed.items():
            path = self.folder / name_of_file
            with opened(path, self._sizes[name_of_file], parts[0][0]) as file:
                total += sum(_copy(file, path, piece, copy, out, self._check) for piece, copy in parts)
        with self._lock:
            self.bytes_read += total
        return out

    def read_tensor(self, name: str, kind: str = "weight", **where: Any) -> Any:
        """``read`` as a 1-D torch tensor of the stored type."""
        import torch

        return torch.from_numpy(self.read(name, kind, **where)).view(getattr(torch, self.dtype(name, kind)))

    def _stored(self, name: str, kind: str) -> list[Piece]:
        stored = self._pieces.get((name, kind))
        if not stored:
            raise IncompleteCheckpoint(f"{self.folder}: holds no tensor {name} ({kind})")
        return stored


def open_checkpoint(folder: Path | str, *, check: bool = True) -> Checkpoint:
    """Open a checkpoint: index and lists of pieces are read and checked, every tensor is covered exactly once, no data yet.

    With ``check`` every block that is read is compared with its checksum; a block (128 KiB) is then the least that is read.
    Without it only the needed bytes are read: for after a ``verify``.
    """
    folder = Path(folder)
    index = layout.read_index(folder)
    pieces: list[Piece] = []
    rank_metadata = []
    for entry in index.ranks:
        listed, own = read_pieces(folder, entry)
        pieces += listed
        rank_metadata.append(own)
    check_types(pieces, folder)
    try:
        check_cover(piece.key for piece in pieces)
    except IncompleteCheckpoint as error:
        raise IncompleteCheckpoint(f"{folder}: {error}") from error
    return Checkpoint(folder, index, pieces, rank_metadata, check)


def read_pieces(folder: Path, entry: layout.RankFile) -> tuple[list[Piece], dict[str, Any]]:
    """A rank's list of pieces and its own metadata, checked against the index."""
    path = folder / entry.pieces_file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    return layout.decode_pieces(data, entry, path)


def _numpy_type(dtype: str) -> np.dtype:
    name = "uint8" if dtype.startswith("float8") else _BITS.get(dtype, dtype)
    return np.dtype(name).newbyteorder("<")


def _copy(file: BinaryIO, path: Path, piece: Piece, copy: Copy, out: np.ndarray, check: bool) -> int:
    """Bring one shared hyper-rectangle into ``out``; return the bytes read.

    One interval on both sides is read in place. Otherwise a stretch of the source with its holes is read and copied by
    strides; it is halved while it is too long, or has holes so long that reading can leave them out.
    """
    width = out.dtype.itemsize
    first, last = copy.source_span
    if copy.contiguous:
        start, stop = copy.target_span
        return read_span(file, path, piece, first * width, _raw(out[start:stop]), check)
    span = (last - first) * width
    wasteful = copy.source_hole * width >= max(HOLE_BYTES, piece.block_bytes if check else 0)
    if (span > SCRATCH_BYTES or wasteful) and copy.numel > 1:
        return sum(_copy(file, path, piece, half, out, check) for half in copy.halves())
    scratch = np.empty(last - first, out.dtype)
    count = read_span(file, path, piece, first * width, _raw(scratch), check)
    _strided(out[copy.target_span[0] :], copy.target_shape, copy.extent)[...] = _strided(
        scratch, copy.source_shape, copy.extent
    )
    return count


def _strided(flat: np.ndarray, shape: Shape, extent: Shape) -> np.ndarray:
    """The first ``extent`` of rows of ``shape``, as a view of ``flat``, which may end with the last element."""
    steps = [step * flat.itemsize for step in strides(shape)]
    return np.lib.stride_tricks.as_strided(flat, extent, steps)


def _raw(array: np.ndarray) -> memoryview:
    return array.view(np.uint8).data
