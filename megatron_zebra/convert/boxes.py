"""An interval of a box of a tensor, as checkpoint.pieces has them, cut out of a whole tensor. Pure."""

from math import prod
from typing import Any

from megatron_zebra.checkpoint.pieces import PieceKey, Shape
from megatron_zebra.errors import UserError

Box = PieceKey


def box_of(
    name: str,
    kind: str,
    shape: Shape,
    offsets: Shape | None,
    local_shape: Shape | None,
    flat_start: int,
    flat_numel: int | None,
) -> Box:
    """What ``Checkpoint.read`` means by its arguments; ValueError if the tensor has no such elements."""
    offsets = tuple(offsets) if offsets is not None else (0,) * len(shape)
    local = tuple(local_shape) if local_shape is not None else tuple(n - o for n, o in zip(shape, offsets))
    numel = prod(local) - flat_start if flat_numel is None else flat_numel
    box = PieceKey(name, kind, tuple(shape), offsets, local, flat_start, numel)
    if kind != "weight":
        raise UserError(f"{name}: only weights are there, no {kind}")
    if problem := box.problem():
        raise ValueError(f"{name} ({kind}): {problem}")
    return box


def cut(whole: Any, box: Box) -> Any:
    """The elements of ``box``, 1-D, out of a numpy array or torch tensor; no more rows of it are touched than they lie in."""
    if not box.flat_numel:
        return whole.reshape(-1)[:0]
    part = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.local_shape))]
    row = prod(box.local_shape[1:])
    first, last = box.flat_start // row, -(-(box.flat_start + box.flat_numel) // row)
    start = box.flat_start - first * row
    return part[first:last].reshape(-1)[start : start + box.flat_numel]
