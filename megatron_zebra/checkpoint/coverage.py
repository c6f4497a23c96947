"""Whether pieces cover a tensor exactly once, by interval arithmetic. Pure.

Almost always the pieces of a box are intervals that tile it, and the boxes tile the tensor; that is checked in
``O(n log n)``. Anything else is settled by a sweep over hyper-rectangles, which also finds where the first defect is.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from megatron_zebra.checkpoint.errors import IncompleteCheckpoint
from megatron_zebra.checkpoint.pieces import PieceKey, Shape, runs, strides

Rectangle = tuple[Shape, Shape]


def check_cover(keys: Iterable[PieceKey], expected: Mapping[tuple[str, str], Sequence[int]] | None = None) -> None:
    """Raise IncompleteCheckpoint unless the pieces cover every tensor exactly once.

    ``expected`` maps (name, kind) to the global shape and must then list exactly the tensors that the pieces name.
    """
    by_tensor: dict[tuple[str, str], list[PieceKey]] = defaultdict(list)
    for key in keys:
        by_tensor[key.name, key.kind].append(key)
    if expected is not None:
        for tensor, wanted in expected.items():
            shape = tuple(wanted)
            if tensor not in by_tensor:
                raise IncompleteCheckpoint(
                    f"{_label(tensor)}: no rank wrote it (elements [0, {prod(shape)}) are missing)"
                )
            if by_tensor[tensor][0].global_shape != shape:
                found = list(by_tensor[tensor][0].global_shape)
                raise IncompleteCheckpoint(f"{_label(tensor)}: written with shape {found}, expected {list(shape)}")
        for tensor in by_tensor:
            if tensor not in expected:
                raise IncompleteCheckpoint(f"{_label(tensor)}: written, but the model has no such tensor")
    for tensor, pieces in by_tensor.items():
        shapes = {p.global_shape for p in pieces}
        if len(shapes) > 1:
            raise IncompleteCheckpoint(f"{_label(tensor)}: pieces disagree on its shape: {sorted(map(list, shapes))}")
        defect = tensor_defect(pieces)
        if defect:
            raise IncompleteCheckpoint(f"{_label(tensor)}: {defect}")


def tensor_defect(pieces: Sequence[PieceKey]) -> str | None:
    """The first defect in the cover of one tensor, in words, or None if every element is covered exactly once."""
    shape = pieces[0].global_shape
    boxes: dict[tuple[Shape, Shape], list[PieceKey]] = defaultdict(list)
    for piece in pieces:
        if piece.flat_numel:
            boxes[piece.offsets, piece.local_shape].append(piece)
    defects = {box: _interval_defect(members) for box, members in boxes.items()}
    if len(boxes) == 1 and next(iter(boxes))[1] == shape:
        return next(iter(defects.values()))
    rectangles: list[Rectangle] = []
    for box, members in boxes.items():
        if defects[box] is None:
            offsets, local = (box[0] or (0,)), (box[1] or (1,))
            rectangles.append((offsets, tuple(o + n for o, n in zip(offsets, local))))
        else:
            rectangles.extend((run.lo, run.hi) for piece in members for run in runs(piece))
    return _rectangle_defect(rectangles, shape or (1,))


def _interval_defect(pieces: Sequence[PieceKey]) -> str | None:
    """The first gap or overlap among the intervals of one box."""
    position = 0
    for piece in sorted(pieces, key=lambda p: p.flat_start):
        if piece.flat_start > position:
            return f"elements [{position}, {piece.flat_start}) are missing"
        if piece.flat_start < position:
            end = min(position, piece.flat_start + piece.flat_numel)
            return f"elements [{piece.flat_start}, {end}) were written more than once"
        position = piece.flat_start + piece.flat_numel
    total = prod(pieces[0].local_shape)
    return None if position == total else f"elements [{position}, {total}) are missing"


def _rectangle_defect(rectangles: list[Rectangle], shape: Shape) -> str | None:
    found = _sweep(rectangles, shape)
    if found is None:
        return None
    times, lo, hi = found
    start = sum(i * s for i, s in zip(lo, strides(shape)))
    stop = sum((i - 1) * s for i, s in zip(hi, strides(shape))) + 1
    where = f"indices {list(lo)} to {list(hi)} (elements within [{start}, {stop}))"
    return f"{where} are missing" if times == 0 else f"{where} were written {times} times"


def _sweep(rectangles: list[Rectangle], shape: Shape) -> tuple[int, Shape, Shape] | None:
    """The first region not covered exactly once: (how often, lo, hi). Slabs along the first dimension, then inwards."""
    if 0 in shape:
        return None
    if not shape:
        return None if len(rectangles) == 1 else (len(rectangles), (), ())
    edges = sorted({0, shape[0], *(r[0][0] for r in rectangles), *(r[1][0] for r in rectangles)})
    pending = sorted(rectangles, key=lambda r: r[0][0], reverse=True)
    active: list[Rectangle] = []
    for begin, end in itertools.pairwise(edges):
        active = [r for r in active if r[1][0] > begin]
        while pending and pending[-1][0][0] <= begin:
            active.append(pending.pop())
        inner = _sweep([(lo[1:], hi[1:]) for lo, hi in active], shape[1:])
        if inner is not None:
            times, lo, hi = inner
            return times, (begin, *lo), (end, *hi)
    return None


def _label(tensor: tuple[str, str]) -> str:
    return f"tensor {tensor[0]} ({tensor[1]})"
