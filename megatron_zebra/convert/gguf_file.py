"""GGUF files of Llama-type models: their header as a config.json, their tensors dequantised to fp32 and put in our order.

The header is read here, because the ``gguf`` package takes its time over a vocabulary; dequantising is left to it.
"""

import operator
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_zebra.convert.boxes import Box, cut
from megatron_zebra.convert.names import gguf_name, their_name
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_MOST = 10_000_000  # entries of an array, tensors: more is no GGUF file
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Stored:
    """A tensor: shape as torch has it, GGML type, first byte in the file."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Header:
    """Everything before the data. ``values``: the metadata by key."""

    file: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(file: Path) -> Header:
    """Metadata and places of tensors; UserError if this is no GGUF file."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{file}: not a GGUF file")
            version, tensors, count = _unpack(opened, "<I"), _unpack(opened, "<Q"), _unpack(opened, "<Q")
            if version not in (2, 3) or max(tensors, count) > _MOST:
                raise UserError(f"{file}: GGUF version {version} of {tensors} tensors; versions 2 and 3 are read")
            values = {_text(opened): _value(opened, _unpack(opened, "<I")) for _ in range(count)}
            listed = [_tensor(opened) for _ in range(tensors)]
            alignment = operator.index(values.get("general.alignment", 32))
            data = -(-opened.tell() // alignment) * alignment
            size = file.stat().st_size
            if late := [name for name, stored in listed if data + stored.start > size]:
                raise UserError(f"{file}: cut: {size:,} bytes, {late[0]} begins after them")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, ZeroDivisionError, MemoryError, RecursionError):
        raise UserError(f"{file}: cut or damaged: its header ends too early or has an unknown type") from None
    return Header(file, values, {name: Stored(s.shape, s.type, data + s.start) for name, s in listed})


def config(header: Header) -> dict[str, Any]:
    """The header as a Llama config.json."""
    try:
        return _config(header)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{header.file}: its metadata are not those of a model ({error})") from None


def _config(header: Header) -> dict[str, Any]:
    values, name = header.values, header.values.get("general.architecture")
    if name != "llama":
        raise UserError(
            f"{header.file}: general.architecture is {name!r}; of GGUF files, those of llama models are read"
        )
    if ROPE_FACTORS in header.tensors:
        raise UserError(
            f"{header.file}: its RoPE scaling is a table of factors ({ROPE_FACTORS}), which is not read; take the original model"
        )
    for key, why in (("llama.attention.sliding_window", "has no window"), ("llama.expert_count", "has no experts")):
        if values.get(key):
            raise UserError(f"{header.file}: {key} is {values[key]}; a llama model here {why}")
    heads, hidden = values.get("llama.attention.head_count"), values.get("llama.embedding_length")
    head_dim = values.get("llama.attention.key_length") or (hidden // heads if heads and hidden else None)
    rotated = values.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(
            f"{header.file}: llama.rope.dimension_count is {rotated} of {head_dim}; here RoPE turns all of a head"
        )
    said = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": values.get("llama.feed_forward_length"),
        "num_hidden_layers": values.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(values.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "max_position_embeddings": values.get("llama.context_length"),
        "vocab_size": header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else None,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(values),
    }
    ids = {key: values.get(f"tokenizer.ggml.{gguf}_token_id") for key, gguf in _SPECIAL.items()}
    return said | {key: value for key, value in ids.items() if value is not None}


_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": _short(values.get("llama.rope.freq_base", 10000.0))}
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling == "none":
        return rope
    rope |= {"rope_type": scaling, "factor": values.get("llama.rope.scaling.factor", 1.0)}
    original = values.get("llama.rope.scaling.original_context_length")
    return rope if scaling == "linear" else rope | {"original_max_position_embeddings": original}


class GgufFiles:
    """The tensors of a GGUF file under transformers' names."""

    def __init__(self, header: Header, arch: Architecture) -> None:
        self._header, self._arch = header, arch
        ours = arch.parameter_shapes()
        known = {gguf_name(name): their_name(name) for name in ours}
        self._stored = {known.get(name, name): name for name in header.tensors}
        self.shapes = {name: header.tensors[stored].shape for name, stored in self._stored.items()}
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> str:
        """fp32, whatever is stored."""
        return "float32"

    def read(self, name: str, box: Box) -> Any:
        """The elements of ``box`` as a 1-D torch tensor."""
        import torch

        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._whole(name)
        return torch.from_numpy(np.array(cut(self._last[1], box)))

    def _whole(self, name: str) -> np.ndarray:
        stored = self._header.tensors[self._stored[name]]
        values = dequantized(self._header.file, stored)
        if name.endswith("q_proj.weight"):
            return in_halves(values, self._arch.num_heads)
        return in_halves(values, self._arch.num_kv_heads) if name.endswith("k_proj.weight") else values


def dequantized(file: Path, stored: Stored) -> np.ndarray:
    """A tensor as fp32."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{file}: reading it needs the package gguf (pip install 'megatron-zebra[hf]')") from None
    try:
        kind = gguf.GGMLQuantizationType(stored.type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, width = prod(stored.shape[:-1]), stored.shape[-1]
        raw = np.memmap(file, np.uint8, "r", stored.start, (rows, width // block * size))
        return np.array(gguf.quants.dequantize(np.array(raw), kind), np.float32).reshape(stored.shape)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UserError(f"{file}: a tensor cannot be read: {' '.join(str(error).split())[:120]}") from None


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection, which GGUF has in pairs (0, 1), (2, 3) to be turned, in our order (0, D/2), (1, D/2 + 1)."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _tensor(file: BinaryIO) -> tuple[str, Stored]:
    name, dims = _text(file), _unpack(file, "<I")
    if dims > 8:
        raise ValueError
    shape = tuple(_unpack(file, "<Q") for _ in range(dims))
    return name, Stored(shape[::-1], _unpack(file, "<I"), _unpack(file, "<Q"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])
    inner, count = _unpack(file, "<I"), _unpack(file, "<Q")
    if count > _MOST:
        raise ValueError
    if inner in _SCALARS:
        code = _SCALARS[inner]
        data = file.read(struct.calcsize(code) * count)
        return list(struct.unpack(f"<{count}{code[1]}", data))
    return [_value(file, inner) for _ in range(count)]


def _text(file: BinaryIO) -> str:
    length = _unpack(file, "<Q")
    if length > _MOST:
        raise ValueError
    return file.read(length).decode(errors="replace")


def _unpack(file: BinaryIO, code: str) -> Any:
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _short(value: float) -> float:
    """An fp32 number as the decimal that it stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
