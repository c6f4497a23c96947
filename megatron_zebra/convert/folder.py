"""What lies at a path: a training checkpoint, a run folder, a Hugging Face folder or a GGUF file; and the model it holds.

Imports no torch, so that a configuration can be checked against a model before anything is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_zebra.checkpoint import catalog, layout
from megatron_zebra.config.fields import in_words
from megatron_zebra.config.sections import Lora
from megatron_zebra.convert import gguf_file, safetensors
from megatron_zebra.convert.families import Understood, understand
from megatron_zebra.convert.names import HEAD, check_tensors, sink_name
from megatron_zebra.convert.values import read_json
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.lora import Shape, adapter_shapes

CONFIG = "config.json"
Form = Literal["checkpoint", "huggingface", "gguf"]


def form_of(path: Path) -> Form:
    """What ``path`` is; UserError if it is none of what can hold a model."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if (path / layout.INDEX).is_file() or (path / "checkpoints").is_dir() or catalog.entries(path):
        return "checkpoint"
    if (path / CONFIG).is_file():
        return "huggingface"
    raise UserError(
        f"{path}: holds no model; allowed are a training checkpoint (a folder with index.json), a run folder, "
        "a Hugging Face folder (with config.json) and a .gguf file"
    )


def architecture_of(path: Path) -> Architecture:
    """The model at ``path``, whatever it is; of a run folder, its newest checkpoint (not verified)."""
    form = form_of(path)
    if form == "gguf":
        return read_gguf(path).architecture
    if form == "huggingface":
        return read_architecture(path)
    if (path / layout.INDEX).is_file():
        return stored_architecture(layout.read_index(path).metadata, path)
    newest = catalog.newest(path / "checkpoints") or catalog.newest(path)
    if newest is None:
        raise UserError(f"{path}: holds no checkpoint")
    return stored_architecture(layout.read_index(newest).metadata, newest)


def read_architecture(folder: Path) -> Architecture:
    """The model of a Hugging Face folder; its config.json is checked against the headers of its safetensors files."""
    understood = read_config(folder)
    if has_safetensors(folder):
        check(folder, understood, safetensors.open_safetensors(folder).shapes)
    return understood.architecture


def read_config(folder: Path) -> Understood:
    """What config.json says."""
    return understand(folder / CONFIG, read_json(folder / CONFIG))


def read_gguf(file: Path) -> Understood:
    """What a GGUF file's header says."""
    return understand(file, gguf_file.config(gguf_file.read_header(file)))


def stored_architecture(metadata: dict[str, Any], where: Path) -> Architecture:
    """The architecture in a checkpoint's metadata."""
    try:
        return Architecture.from_dict(metadata["architecture"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: does not say of what model it is ({in_words(error)})") from None


def check_stored(tensors: Mapping[tuple[str, str], Shape], arch: Architecture, adapters: Lora, where: Path) -> None:
    """Whether the weights of a checkpoint, (name, kind) -> shape, are those that its own metadata promise."""
    for name, shape in (arch.parameter_shapes() | adapter_shapes(arch, adapters)).items():
        held = tensors.get((name, "weight"))
        if held is None:
            raise UserError(f"{where}: a tensor is missing that its metadata ask for: {name}")
        if held != shape:
            raise UserError(f"{where}: {name} has shape {list(held)}, by its metadata it would be {list(shape)}")


def has_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (safetensors.WHOLE, safetensors.INDEX))


def check(where: Path, understood: Understood, shapes: dict[str, tuple[int, ...]]) -> None:
    """Whether the tensors there are those that config.json promises."""
    arch = understood.architecture
    spare = {sink_name(layer) for layer in range(arch.num_layers)} if understood.sinks else set()
    if understood.sinks and (without := spare - shapes.keys()):
        raise UserError(f"{where}: tensors are missing that config.json asks for: {sorted(without)[0]}")
    check_tensors(where, arch, shapes, spare | ({HEAD} if arch.tie_embeddings else set()))
