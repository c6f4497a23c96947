"""Whether the KV cache, or the logits of whole prompts, fit into the memory that is free."""

from collections.abc import Sequence

import torch

from megatron_zebra.errors import UserError
from megatron_zebra.inference.cache import BLOCK
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.planning.kv_cache import kv_cache_bytes

SHARE = 0.9  # of what is free; the rest is for activations


def check_room(arch: Architecture, decoder: torch.nn.Module, lengths: Sequence[int], tp: int = 1) -> None:
    """UserError, saying what fits, if sequences of ``lengths`` tokens need more than is free."""
    param = next(decoder.parameters())
    free = free_bytes(param.device)
    if free is None:
        return

    def needed(tokens: int) -> int:
        return kv_cache_bytes(arch, tokens, param.element_size(), tp, BLOCK)

    total = sum(map(needed, lengths))
    if total > SHARE * free:
        each, low, high = SHARE * free / len(lengths), 0, max(lengths)
        while low < high:  # the most tokens of a sequence that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= each else (low, middle - 1)
        raise UserError(
            f"{len(lengths)} sequence{'s' if len(lengths) > 1 else ''} of up to {max(lengths):,} tokens: the KV cache needs "
            f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} are free; {low:,} tokens each would fit"
        )


def check_logits_room(arch: Architecture, decoder: torch.nn.Module, batch: int, length: int) -> None:
    """UserError, saying what fits, if the logits of ``batch`` prompts of ``length`` tokens need more than is free."""
    param = next(decoder.parameters())
    free = free_bytes(param.device)
    each = batch * arch.vocab_size * param.element_size()  # bytes of a token of every prompt
    if free is not None and length * each > SHARE * free:
        raise UserError(
            f"{batch} x {length:,} tokens: their logits need {length * each / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
            f"{int(SHARE * free) // each:,} tokens each would fit, and tools/evaluate.py logits writes any number to a file"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that could be allocated on ``device``; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
