"""A Hugging Face folder or GGUF file to a training checkpoint that holds weights alone, bit for bit, one tensor at a time."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.checkpoint.writer import commit, write_pieces
from megatron_zebra.convert import gguf_file, kept
from megatron_zebra.convert.output import check_finite, new_folder
from megatron_zebra.convert.pattern import with_pattern
from megatron_zebra.convert.safetensors import ITEM_BYTES
from megatron_zebra.convert.source import ForeignSource, open_model
from megatron_zebra.convert.values import read_json
from megatron_zebra.data.progress import Progress
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture


def from_hf(
    path: Path,
    output: Path,
    *,
    layer_group_size: int | None = None,
    window_size: int | None = None,
    pattern: str | None = None,
    rope_length: int | None = None,
) -> list[str]:
    """Convert the model at ``path`` into the checkpoint folder ``output``.

    Args:
        layer_group_size, window_size, pattern: which layers become local; see ``pattern.with_pattern``.
        rope_length: the length for which dynamic NTK is frozen (default: its factor times max_position_embeddings).

    Returns:
        Notes for the user, a line each.
    """
    source = open_model(path)
    if not isinstance(source, ForeignSource):
        raise UserError(f"{path}: is a training checkpoint already")
    arch = _with_rope_length(with_pattern(source.architecture, layer_group_size, window_size, pattern), rope_length)
    if path.is_dir():
        kept.check_tokenizer(path, arch.vocab_size)
    notes = list(source.notes)
    if "local" in source.architecture.layer_kinds and arch.layer_kinds != source.architecture.layer_kinds:
        notes.append(f"{path}: has windows of its own, which the options replace")
    shapes = arch.parameter_shapes()
    needed = sum(prod(shape) * ITEM_BYTES[source.dtype(name)] for name, shape in shapes.items())
    with new_folder(output, needed) as folder:
        if path.is_dir():
            kept.copy_files(path, folder / kept.KEPT, (kept.CONFIG, kept.GENERATION, *kept.TOKENIZER, *kept.TERMS))
        else:
            notes += _keep_of_gguf(path, folder / kept.KEPT, arch.vocab_size)
        with Progress(f"reading {path.name}", needed) as bar:
            written = write_pieces(folder, 0, _pieces(source, shapes, bar))
        metadata = {"architecture": arch.to_dict(), "progress": {}, "source": {"family": source.family}}
        commit(folder, 0, metadata, [written.entry], {(name, "weight"): shape for name, shape in shapes.items()})
    return notes


def _pieces(
    source: ForeignSource, shapes: dict[str, tuple[int, ...]], bar: Progress
) -> Iterator[tuple[PieceKey, torch.Tensor]]:
    for name, shape in shapes.items():
        values = source.read_tensor(name)
        check_finite(values, name, source.folder)
        yield PieceKey.whole(name, "weight", shape), values
        bar.update(values.nbytes, name)


def _with_rope_length(arch: Architecture, length: int | None) -> Architecture:
    if length is None:
        return arch
    if length < 1:
        raise UserError(f"--rope-length {length}: must be 1 or more")
    if not any(rope.scaling == "dynamic" for rope in arch.rope.values()):
        raise UserError(f"--rope-length {length}: the model's RoPE is not dynamic NTK, so there is nothing to freeze")
    ropes: dict[Any, Any] = {
        kind: rope.model_copy(update={"length": length}) if rope.scaling == "dynamic" else rope
        for kind, rope in arch.rope.items()
    }
    originals = [rope.original_length or 0 for rope in arch.rope.values()]
    return replace(arch, rope=ropes, max_length=max(length, *originals))


def _keep_of_gguf(file: Path, target: Path, vocab_size: int) -> list[str]:
    """What a Hugging Face folder would have had: transformers makes its tokenizer files out of the GGUF file."""
    try:
        with contextlib.redirect_stdout(None):
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.save_pretrained(target)
        file_of_config = target / "tokenizer_config.json"
        config = {
            key: value
            for key, value in read_json(file_of_config).items()
            if key not in ("is_local", "local_files_only")
        }
        # A class that transformers 4 and 5 both know.
        kept.write_json(file_of_config, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        notes = [f"{file}: no tokenizer files were made of it ({type(error).__name__}: {why})"]
    else:
        notes = []
        kept.check_tokenizer(target, vocab_size)
    target.mkdir(exist_ok=True)
    kept.write_json(target / kept.CONFIG, gguf_file.config(gguf_file.read_header(file)))
    return notes
