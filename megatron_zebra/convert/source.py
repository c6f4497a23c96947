"""A model to read from, by our parameter names, whatever form it is in."""

from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_zebra.checkpoint.collective import Collective
from megatron_zebra.checkpoint.locate import locate
from megatron_zebra.checkpoint.pieces import PieceKey, Shape
from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_zebra.convert import folder as folders
from megatron_zebra.convert import gguf_file, torch_files
from megatron_zebra.convert.boxes import Box, box_of
from megatron_zebra.convert.families import Understood, understand
from megatron_zebra.convert.names import EMBEDDING, HEAD, sink_name, their_name
from megatron_zebra.convert.safetensors import open_safetensors
from megatron_zebra.errors import UserError
from megatron_zebra.model import lora
from megatron_zebra.model.architecture import Architecture

NO_SINK = -1e4  # exp of less is 0 beside any score
COMPARED = 1 << 22  # elements


class ModelSource(Protocol):
    """Weights by our names (``Architecture.parameter_shapes``). ``notes``: a line each of what the user should know."""

    folder: Path
    architecture: Architecture
    notes: list[str]

    def names(self) -> list[str]: ...

    def dtype(self, name: str) -> str:
        """The stored type, as torch names it."""
        ...

    def read_tensor(
        self,
        name: str,
        kind: str = "weight",
        offsets: Shape | None = None,
        local_shape: Shape | None = None,
        flat_start: int = 0,
        flat_numel: int | None = None,
    ) -> torch.Tensor:
        """Those elements of the tensor, 1-D, of the stored type; see ``checkpoint.reader.Checkpoint.read``."""
        ...


def open_model(path: Path, collective: Collective | None = None) -> ModelSource:
    """Open the model at ``path``: a training checkpoint, a run folder (its newest good one), a Hugging Face folder or a GGUF file.

    Args:
        collective: of all processes that open it, where there are several; they share out the verification of a run's checkpoints.

    Raises:
        UserError: in one line, if there is no model, or one that cannot be expressed here.
    """
    form = folders.form_of(path)
    if form == "checkpoint":
        return CheckpointSource(open_checkpoint(locate(path, collective)))
    if form == "gguf":
        header = gguf_file.read_header(path)
        understood = understand(path, gguf_file.config(header))
        return ForeignSource(path, understood, gguf_file.GgufFiles(header, understood.architecture))
    understood = folders.read_config(path)
    if folders.has_safetensors(path):
        return ForeignSource(path, understood, open_safetensors(path))
    if any((path / name).is_file() for name in (torch_files.WHOLE, torch_files.INDEX)):
        return ForeignSource(path, understood, torch_files.TorchFiles(path))
    raise UserError(
        f"{path}: has config.json but no weights (model.safetensors, pytorch_model.bin, or an index of shards)"
    )


class CheckpointSource:
    """A training checkpoint, its adapters merged into the weights (which then are read in fp32, whatever is stored)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self.lora = lora.from_metadata(checkpoint.metadata, self.folder)
        self.architecture = folders.stored_architecture(checkpoint.metadata, self.folder)
        folders.check_stored(checkpoint.tensors(), self.architecture, self.lora, self.folder)
        self.notes: list[str] = []

    def names(self) -> list[str]:
        return [name for name in self.checkpoint.names() if not name.endswith(lora.ADAPTERS)]

    def dtype(self, name: str) -> str:
        return self.checkpoint.dtype(name)

    def read_tensor(
        self,
        name: str,
        kind: str = "weight",
        offsets: Shape | None = None,
        local_shape: Shape | None = None,
        flat_start: int = 0,
        flat_numel: int | None = None,
    ) -> torch.Tensor:
        where: dict[str, Any] = {
            "offsets": offsets,
            "local_shape": local_shape,
            "flat_start": flat_start,
            "flat_numel": flat_numel,
        }
        if kind != "weight":
            return self.checkpoint.read_tensor(name, kind, **where)
        return lora.merged(self.checkpoint.read_tensor, self.lora, name, self.checkpoint.shape(name), **where)


class Files(Protocol):
    """Tensors by transformers' names."""

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> str: ...

    def read(self, name: str, box: Box) -> torch.Tensor: ...


class ForeignSource:
    """A Hugging Face folder or a GGUF file, its tensors as its configuration promises."""

    def __init__(self, folder: Path, understood: Understood, files: Files) -> None:
        self.folder, self.architecture, self.family, self._files = (
            folder,
            understood.architecture,
            understood.family,
            files,
        )
        folders.check(folder, understood, files.shapes)
        self.notes = (
            [
                f"{folder}: keys of config.json that are not known here, and so not converted: {', '.join(understood.unknown)}"
            ]
            if understood.unknown
            else []
        )
        if understood.sinks:
            self._check_sinks()
        if self.architecture.tie_embeddings and HEAD in files.shapes:
            self._check_tied()

    def names(self) -> list[str]:
        return sorted(self.architecture.parameter_shapes())

    def dtype(self, name: str) -> str:
        return self._files.dtype(their_name(name))

    def read_tensor(
        self,
        name: str,
        kind: str = "weight",
        offsets: Shape | None = None,
        local_shape: Shape | None = None,
        flat_start: int = 0,
        flat_numel: int | None = None,
    ) -> torch.Tensor:
        theirs = their_name(name)
        if theirs not in self._files.shapes:
            raise UserError(f"{self.folder}: holds no tensor {theirs}")
        box = box_of(name, kind, self._files.shapes[theirs], offsets, local_shape, flat_start, flat_numel)
        return self._files.read(theirs, box)

    def _check_sinks(self) -> None:
        for layer in range(self.architecture.num_layers):
            name = sink_name(layer)
            box = PieceKey.whole(name, "weight", self._files.shapes[name])
            if float(self._files.read(name, box).max()) > NO_SINK:
                raise UserError(f"{self.folder}: {name}: attention has sinks, which cannot be expressed here")

    def _check_tied(self) -> None:
        shape = self._files.shapes[EMBEDDING]
        if self._files.shapes[HEAD] == shape and self._files.dtype(HEAD) == self._files.dtype(EMBEDDING):
            total = PieceKey.whole(HEAD, "weight", shape).flat_numel
            parts = (
                box_of(HEAD, "weight", shape, None, None, at, min(COMPARED, total - at))
                for at in range(0, total, COMPARED)
            )
            if all(torch.equal(self._files.read(HEAD, part), self._files.read(EMBEDDING, part)) for part in parts):
                return
        raise UserError(
            f"{self.folder}: config.json has tie_word_embeddings true, but {HEAD} differs from {EMBEDDING}; set it to false"
        )
