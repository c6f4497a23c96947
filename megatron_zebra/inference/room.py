"""Whether the KV cache, or the logits of whole prompts, fit into the memory that is free."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_zebra.errors import UserError
from megatron_zebra.inference.cache import BLOCK
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.planning.kv_cache import kv_cache_bytes, kv_layer_bytes

SHARE = 0.9  # of what is free; the rest is for activations


def check_room(arch: Architecture, decoder: torch.nn.Module, lengths: Sequence[int], tp: int = 1) -> None:
    """UserError, saying what fits, if sequences of ``lengths`` tokens need more than is free."""
    param = next(decoder.parameters())
    free = free_bytes(param.device)
    if free is None:
        return
    if param.device.type == "cpu":
        free //= tp  # the ranks of a layer share the machine

    def needed(sizes: Sequence[int]) -> int:
        kept = sum(kv_cache_bytes(arch, tokens, param.element_size(), tp, BLOCK) for tokens in sizes)
        if "global" not in arch.layer_kinds:
            return kept
        # While a layer's store grows, what it replaces is still there.
        return kept + kv_layer_bytes(arch, "global", max(sizes) - BLOCK, param.element_size(), tp, BLOCK)

    total = needed(lengths)
    if total > SHARE * free:
        low, high = 0, max(lengths)
        while low < high:  # the most tokens of a sequence that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed([middle] * len(lengths)) <= SHARE * free else (low, middle - 1)
        raise UserError(
            f"{len(lengths)} sequence{'s' if len(lengths) > 1 else ''} of up to {max(lengths):,} tokens: the KV cache needs "
            f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} are free; {low:,} tokens each would fit"
        )


def check_logits_room(arch: Architecture, device: torch.device, batch: int, length: int) -> None:
    """UserError, saying what fits, if the fp32 logits of ``batch`` prompts of ``length`` tokens need more than is free."""
    free = free_bytes(device)
    each = batch * arch.vocab_size * 4  # bytes of a token of every prompt
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
        machine = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    return min([machine, *_left_to_groups()])


def _left_to_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group (version 2) of this process may still take: a container's limit, a Slurm job's.

    Files in the page cache count as taken, but make room.
    """
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):
        return
    for folder in (root / path, *(root / path).parents):
        with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit, another "max"
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit - used + int(told["inactive_file"])
        if folder == root:
            return
