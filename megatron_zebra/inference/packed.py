"""Several texts in one call of the model, one after another without padding between them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_zebra.attention.segments import Segments
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.tensor import gather_sequence


@torch.no_grad()
def packed_states(decoder: Decoder, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What goes into the head for every token of ``texts`` (each [T], on the decoder's device): [sum of T, hidden_size].

    Under tensor parallelism all ranks call together, and all get everything.
    """
    assert decoder.head is not None
    tp = decoder.head.tp
    lengths = [len(text) for text in texts]
    tokens = torch.cat(list(texts))
    padding = -len(tokens) % tp.size
    if padding:
        lengths.append(padding)
    positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
    segments = Segments.from_lengths(lengths, device=tokens.device)
    states = decoder.states(F.pad(tokens, (0, padding)), positions, segments)
    return gather_sequence(states, tp)[: len(tokens)]
