"""A decoder with the weights of a model source, whole on one device."""

import torch

from megatron_zebra.convert.source import ModelSource
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer


@torch.no_grad()
def load_decoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model of ``source`` for inference; its weights are cast to ``dtype``, one tensor at a time."""
    arch = source.architecture
    model = Decoder(arch, Initializer(0, 0.02, arch.num_layers, dtype, device))
    for name, param in model.named_parameters():
        param.copy_(source.read_tensor(name).view(param.shape))
    return model.eval()
