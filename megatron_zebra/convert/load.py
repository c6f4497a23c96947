"""A decoder with the weights of a model source: whole, or the part of one rank."""

from typing import Any

import torch

from megatron_zebra.convert.source import ModelSource
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.group import Group
from megatron_zebra.parallel.sharding import Sharding


@torch.no_grad()
def load_decoder(
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tp: Group | None = None,
    layers: range | None = None,
    vocab_multiple: int = 1,
    backend: str = "auto",
) -> Decoder:
    """The model of ``source``, or the stage of it with ``layers``, for inference; its weights are cast to ``dtype``, one
    tensor at a time."""
    arch, tp = source.architecture, tp or Group.alone("tp")
    sharding = Sharding(tp.size, tp.rank, arch.num_kv_heads, vocab_multiple)
    init = Initializer(0, 0.02, arch.num_layers, dtype, device, tp, sharding, trained=lambda name: False, blank=True)
    model = Decoder(arch, init, layers=layers, backend=backend)
    param: Any
    for param in model.parameters():
        box = param.box
        own = param[tuple(map(slice, box.shape))]  # without the padding of the vocabulary
        own.copy_(source.read_tensor(param.full_name, offsets=box.offsets, local_shape=box.shape).view(box.shape))
    return model.eval()
