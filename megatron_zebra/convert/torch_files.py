"""Weights in pytorch_model.bin files, read without running what a pickle may hold."""

from pathlib import Path
from typing import Any

import torch

from megatron_zebra.convert.boxes import Box, cut
from megatron_zebra.convert.safetensors import ITEM_BYTES, weight_files
from megatron_zebra.errors import UserError

WHOLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class TorchFiles:
    """The tensors of a folder's .bin files by name. A file is mapped anew for each read, so that no pages of it stay."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, Path] = {}
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder, WHOLE, INDEX):
            for name, tensor in _load(file).items():
                if name in self._places:
                    raise UserError(f"{file}: holds {name}, and so does {self._places[name].name}")
                dtype = str(tensor.dtype).removeprefix("torch.")
                if dtype not in ITEM_BYTES:
                    raise UserError(f"{file}: {name} is of type {dtype}; {', '.join(ITEM_BYTES)} are read")
                self._places[name], self._dtypes[name], self.shapes[name] = file, dtype, tuple(tensor.shape)

    def dtype(self, name: str) -> str:
        """As torch names it."""
        return self._dtypes[name]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``, 1-D."""
        return cut(_load(self._places[name])[name], box).clone()


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{file}: not a file of tensors that can be mapped; save it as safetensors ({why})") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise UserError(f"{file}: does not hold tensors by name alone")
    return loaded
