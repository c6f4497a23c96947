"""A trained model out of a checkpoint, without an optimizer."""

from pathlib import Path

import torch

from megatron_zebra.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer


@torch.no_grad()
def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Architecture, Decoder]:
    """The decoder with the checkpoint's weights; they are checked while they are read."""
    checkpoint: Checkpoint = open_checkpoint(folder)
    arch = Architecture.from_dict(checkpoint.metadata["architecture"])
    model = Decoder(arch, Initializer(0, 0.02, arch.num_layers, dtype, device))
    for name, param in model.named_parameters():
        param.copy_(checkpoint.read_tensor(name).view(param.shape))
    return arch, model.eval()
