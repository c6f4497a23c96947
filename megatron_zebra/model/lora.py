"""LoRA as conversion, checkpoints and planning see it: names and shapes of adapters, and weights with these merged in.

Imports no torch. An adapter of ``layers.0.attention.q_proj.weight`` is ``....q_proj.lora_a`` [rank, in] and
``....q_proj.lora_b`` [out, rank]; a checkpoint that has some says so in its metadata, ``lora``: {rank, alpha, targets}.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from megatron_zebra.config.fields import in_words
from megatron_zebra.config.sections import Lora
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture

Shape = tuple[int, ...]
ADAPTERS = (".lora_a", ".lora_b")


def adapter_shapes(arch: Architecture, lora: Lora) -> dict[str, Shape]:
    """Every adapter by name, with its whole shape; none if ``lora.rank`` is 0."""
    shapes: dict[str, Shape] = {}
    for name, shape in arch.parameter_shapes().items() if lora.rank else ():
        if is_target(name, lora):
            a, b = adapters(name)
            shapes |= {a: (lora.rank, shape[1]), b: (shape[0], lora.rank)}
    return shapes


def is_target(name: str, lora: Lora) -> bool:
    """Whether parameter ``name`` is a weight with an adapter."""
    module, kind = name.split(".")[-2:]
    return lora.rank > 0 and kind == "weight" and module in lora.targets


def adapters(name: str) -> tuple[str, str]:
    """Names of A and B of the weight ``name``."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_a", f"{module}.lora_b"


def to_metadata(lora: Lora) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters; None if there are none."""
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)} if lora.rank else None


def from_metadata(metadata: Mapping[str, Any], where: Path) -> Lora:
    """The adapters of the checkpoint at ``where`` with ``metadata``; UserError if it says nothing sensible of them."""
    try:
        return Lora.model_validate(metadata.get("lora") or {})
    except ValueError as error:
        raise UserError(f"{where}: does not say which adapters it has ({in_words(error)})") from None


def merged(
    read: Callable[..., Any],
    lora: Lora,
    name: str,
    shape: Sequence[int],
    *,
    offsets: Sequence[int] | None = None,
    local_shape: Sequence[int] | None = None,
    flat_start: int = 0,
    flat_numel: int | None = None,
) -> Any:
    """Weight ``name`` with its adapter merged in, W + alpha / rank B A (fp32), or as it is where it has none.

    Args:
        read: reads a part of a tensor, by name and these keywords, as a 1-D torch tensor (``Checkpoint.read_tensor``).
        shape: of the whole weight.
        offsets, local_shape, flat_start, flat_numel: the part wanted: an interval of the flattened box; default all.

    Returns:
        1-D tensor [flat_numel].
    """
    offsets = tuple(offsets or (0,) * len(shape))
    local = tuple(local_shape or (n - o for n, o in zip(shape, offsets)))
    numel = prod(local) - flat_start if flat_numel is None else flat_numel
    weight = read(name, offsets=offsets, local_shape=local, flat_start=flat_start, flat_numel=numel)
    if not is_target(name, lora) or not numel:
        return weight
    width = local[1]
    first, last = flat_start // width, -(-(flat_start + numel) // width)  # rows of the box that the interval touches
    a_name, b_name = adapters(name)
    a = read(a_name, offsets=(0, offsets[1]), local_shape=(lora.rank, width))
    b = read(b_name, offsets=(offsets[0] + first, 0), local_shape=(last - first, lora.rank))
    product = b.float().view(-1, lora.rank) @ a.float().view(lora.rank, width)
    start = flat_start - first * width
    return weight.float() + product.view(-1)[start : start + numel] * (lora.alpha / lora.rank)
