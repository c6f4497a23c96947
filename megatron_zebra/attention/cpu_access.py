"""How a call of the CPU kernel reads its queries and keys from packed tensors, and writes its results back.

Both kinds of call of ``blocks`` look the same from outside. Everything is laid out as the kernel wants it:
packed [T, heads, ...] on one side, [count, heads, length, ...] on the other.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from megatron_zebra.attention.blocks import Padded, Plan, Tiles
from megatron_zebra.attention.window import Int64, Window

CHUNK_BYTES = 2 << 20  # of the keys of one call: bounds the gradients that wait to be added up


@lru_cache(maxsize=16)
def _band_mask(lead: int, rows: int, keys: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, rows, keys], 0 or -inf: row r sees keys ``lead + r - window .. lead + r`` of its tile."""
    distance = torch.arange(rows)[:, None] + lead - torch.arange(keys)[None]
    hidden = (distance < 0) | (distance > window)
    return torch.zeros(1, 1, rows, keys, dtype=dtype).masked_fill_(hidden, float("-inf"))


class TileAccess:
    """Tiles at a constant stride: read through overlapping views, without a copy."""

    def __init__(self, tiles: Tiles, window: Window, dtype: torch.dtype):
        self.tiles = tiles
        self.causal = tiles.kind == "causal"
        self.merge = tiles.merge
        self.mask: torch.Tensor | None = None
        if tiles.kind == "band":
            assert window is not None
            self.mask = _band_mask(window, tiles.rows, tiles.keys, window, dtype)

    def _view(self, x: torch.Tensor, start: int, length: int) -> torch.Tensor:
        row, head, *inner = x.stride()
        shape = (self.tiles.count, x.shape[1], length, *x.shape[2:])
        strides = (self.tiles.rows * row, head, row, *inner)
        return x.as_strided(shape, strides, x.storage_offset() + start * row)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._view(x, self.tiles.q_start, self.tiles.rows)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._view(x, self.tiles.k_start, self.tiles.keys)

    def put_queries(self, x: torch.Tensor, piece: torch.Tensor) -> None:
        self.queries(x).copy_(piece)

    def add_queries(self, x: torch.Tensor, piece: torch.Tensor) -> None:
        self.queries(x).add_(piece)

    def add_keys(self, x: torch.Tensor, piece: torch.Tensor) -> None:
        """Tiles overlap in their keys, but not in the same ``rows``-long part of them: one addition a part."""
        rows, keys = self.tiles.rows, self.tiles.keys
        for offset in range(0, keys, rows):
            length = min(rows, keys - offset)
            self._view(x, self.tiles.k_start + offset, length).add_(piece[:, :, offset : offset + length])


class PaddedAccess:
    """Short segments: gathered into a padded batch. Padding is zero, and no real query sees it."""

    merge = False

    def __init__(self, padded: Padded, window: Window, dtype: torch.dtype):
        self.padded = padded
        self.causal = not padded.banded
        self.target = torch.from_numpy(padded.target)
        self.mask: torch.Tensor | None = None
        if padded.banded:
            assert window is not None
            self.mask = _band_mask(0, padded.length, padded.length, window, dtype)

    def _gather(self, x: torch.Tensor, source: Int64) -> torch.Tensor:
        count, length, inner = self.padded.count, self.padded.length, x.shape[1:]
        rows = x.new_zeros(count * length, *inner)
        rows.index_copy_(0, self.target, x.index_select(0, torch.from_numpy(source)))
        return rows.view(count, length, *inner).transpose(1, 2)

    def _put(self, x: torch.Tensor, source: Int64, piece: torch.Tensor) -> None:
        rows = piece.transpose(1, 2).reshape(-1, *x.shape[1:]).index_select(0, self.target)
        x.index_copy_(0, torch.from_numpy(source), rows)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather(x, self.padded.q_source)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather(x, self.padded.k_source)

    def put_queries(self, x: torch.Tensor, piece: torch.Tensor) -> None:
        self._put(x, self.padded.q_source, piece)

    add_queries = put_queries  # no other call has these queries or these keys

    def add_keys(self, x: torch.Tensor, piece: torch.Tensor) -> None:
        self._put(x, self.padded.k_source, piece)


def accesses(calls: Plan, k: torch.Tensor) -> Iterator[TileAccess | PaddedAccess]:
    """The plan's calls in order, tiles in batches whose keys ``k`` [Tk, Hkv, D] take about CHUNK_BYTES."""
    row_bytes = k.shape[1] * k.shape[2] * k.element_size()
    for tiles in calls.tiles:
        size = max(1, CHUNK_BYTES // (tiles.keys * row_bytes))
        for t in range(0, tiles.count, size):
            shift, count = t * tiles.rows, min(size, tiles.count - t)
            part = replace(tiles, q_start=tiles.q_start + shift, k_start=tiles.k_start + shift, count=count)
            yield TileAccess(part, calls.window, k.dtype)
    for padded in calls.padded:
        yield PaddedAccess(padded, calls.window, k.dtype)
