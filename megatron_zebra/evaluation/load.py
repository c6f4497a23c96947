"""A trained model without an optimizer."""

from pathlib import Path

import torch

from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import open_model
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Architecture, Decoder]:
    """The decoder of a checkpoint, a run folder or a Hugging Face folder; a checkpoint is checked while it is read."""
    source = open_model(path)
    return source.architecture, load_decoder(source, device, dtype)
