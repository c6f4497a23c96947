"""Safetensors files written as a stream: headers from shapes alone, then the tensors in pieces."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_zebra.checkpoint import files
from megatron_zebra.checkpoint.writer import as_bytes
from megatron_zebra.convert.hosts import GRANITE
from megatron_zebra.convert.names import sink_name, their_name
from megatron_zebra.convert.output import CHUNK, check_finite
from megatron_zebra.convert.safetensors import DTYPES, ITEM_BYTES, WHOLE
from megatron_zebra.convert.source import ModelSource
from megatron_zebra.data.progress import Progress
from megatron_zebra.errors import UserError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NO_SINK = {"float16": -6e4}  # as far as it goes; the others -1e9


@dataclass(frozen=True)
class Planned:
    """A tensor to write: their name, ours (None: attention sinks that take nothing), shape and type."""

    name: str
    ours: str | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def plan(source: ModelSource, host: str, dtype: str | None) -> list[Planned]:
    """Every tensor of the export, in order; a tied head is not among them."""
    arch = source.architecture
    planned = [
        Planned(their_name(name), name, shape, dtype or source.dtype(name))
        for name, shape in arch.parameter_shapes().items()
    ]
    if host == GRANITE:
        planned += [Planned(sink_name(i), None, (arch.num_heads,), planned[0].dtype) for i in range(arch.num_layers)]
    return planned


def split(planned: list[Planned], max_shard_size: int) -> dict[str, list[Planned]]:
    """File name -> its tensors; a file is begun where the next tensor would make the last one larger than allowed."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(file: Path, tensors: list[Planned], source: ModelSource, bar: Progress) -> None:
    """Write one file; no more than CHUNK elements of a tensor are in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.naming("writing", file), files.create(file) as opened:
        files.write(opened, struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for values in _values(tensor, source):
                files.write(opened, as_bytes(values)[0].data)
                bar.update(values.nbytes, tensor.name)
        files.sync(opened)


def _values(tensor: Planned, source: ModelSource) -> Iterator[torch.Tensor]:
    """The tensor in its new type, a part at a time."""
    dtype = getattr(torch, tensor.dtype)
    if tensor.ours is None:
        yield torch.full(tensor.shape, _NO_SINK.get(tensor.dtype, -1e9), dtype=dtype)
        return
    total = prod(tensor.shape)
    for start in range(0, total, CHUNK):
        stored = source.read_tensor(tensor.ours, flat_start=start, flat_numel=min(CHUNK, total - start))
        check_finite(stored, tensor.ours, source.folder)
        values = stored.to(dtype)
        if values.dtype != stored.dtype and not torch.isfinite(values).all():
            raise UserError(
                f"{source.folder}: {tensor.ours} has values too large for {tensor.dtype}; give another --dtype"
            )
        yield values
