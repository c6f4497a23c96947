"""Weights in safetensors files: what their headers say, and the bytes that are asked for. Imports no torch for the headers."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zebra.convert.boxes import Box, cut
from megatron_zebra.convert.names import some
from megatron_zebra.convert.values import read_json
from megatron_zebra.errors import UserError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes, as the format has it


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes ``start`` to ``start + size`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFiles:
    """The tensors of a folder's safetensors files by name. Reads map a file for the moment, and touch what they return."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}

    def dtype(self, name: str) -> str:
        """As torch names it."""
        return self.entries[name].dtype

    def read(self, name: str, box: Box) -> Any:
        """The elements of ``box`` as a 1-D torch tensor."""
        import torch

        entry = self.entries[name]
        bits = np.dtype({2: np.uint16, 4: np.float32, 8: np.float64}[ITEM_BYTES[entry.dtype]]).newbyteorder("<")
        if not box.flat_numel:
            return torch.empty(0, dtype=getattr(torch, entry.dtype))
        try:
            mapped = np.memmap(entry.file, bits, "r", entry.start, entry.shape or (1,))
            values = np.array(cut(mapped, box))  # a copy, so that the file is let go of
        except (OSError, ValueError) as error:
            raise UserError(f"{entry.file}: cannot be read ({error})") from None
        tensor = torch.from_numpy(values)
        return tensor.view(getattr(torch, entry.dtype))


def open_safetensors(folder: Path) -> SafetensorsFiles:
    """The tensors of ``folder``: of its model.safetensors, or of all files that its index names."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder, WHOLE, INDEX):
        for name, entry in read_header(file).items():
            if name in entries:
                raise UserError(f"{file}: holds {name}, and so does {entries[name].file.name}")
            entries[name] = entry
    return SafetensorsFiles(entries)


def weight_files(folder: Path, whole: str, index: str) -> list[Path]:
    """The one file ``whole``, or those that ``index`` names; UserError if one is not there."""
    if (folder / whole).is_file():
        return [folder / whole]
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / index}: weight_map, the file of each tensor, is missing")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{folder / index}: names a file outside its folder: {some(outside)}")
    if missing := [name for name in names if not os.path.isfile(folder / name)]:  # False too for a name too long
        raise UserError(f"{folder}: files are missing that {index} names: {some(missing)}")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, Entry]:
    """What one file holds, checked against its length."""
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))[0]
            size = file.stat().st_size
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise UserError(f"{file}: not a safetensors file, or cut ({size:,} bytes)")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a safetensors file (its header is not a JSON object)")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, item, 8 + length, size) for name, item in header.items()}


def _entry(file: Path, name: str, item: Any, begin: int, size: int) -> Entry:
    try:
        dtype, shape, (first, last) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 2**62 for n in (*shape, first, last)):
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{file}: not a safetensors file (its header says nothing sensible of {name})") from None
    if dtype not in DTYPES:
        raise UserError(
            f"{file}: {name} is of type {dtype}; {', '.join(DTYPES)} are read (save a quantised model in one of them first)"
        )
    if last - first != prod(shape) * ITEM_BYTES[DTYPES[dtype]]:
        raise UserError(f"{file}: not a safetensors file ({name} of shape {list(shape)} has {last - first} bytes)")
    if begin + last > size:
        raise UserError(f"{file}: cut: {size:,} bytes, {name} ends at {begin + last:,}")
    return Entry(file, DTYPES[dtype], shape, begin + first)
