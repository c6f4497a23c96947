"""Geometry of pieces: flat intervals of boxes of global tensors, and what two of them share. Pure.

A *box* is ``offsets .. offsets + local_shape`` of a global tensor (one rank's tensor-parallel slice). A *piece* is elements
``[flat_start, flat_start + flat_numel)`` of that box flattened row-major. An interval of a box is cut into at most ``2 * ndim - 1``
*runs*, hyper-rectangles that each lie contiguous in the flattened box; two runs share a hyper-rectangle, so any layout is
assembled from any other by strided copies alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PieceKey:
    """Which elements of which tensor: everything about a piece but its bytes.

    ``name`` carries the global layer number; ``kind`` is "weight", "exp_avg", "exp_avg_sq" or any other string.
    Lengths are in elements. A scalar has ``global_shape == ()``.
    """

    name: str
    kind: str
    global_shape: Shape
    offsets: Shape
    local_shape: Shape
    flat_start: int
    flat_numel: int

    @classmethod
    def whole(cls, name: str, kind: str, shape: Shape) -> "PieceKey":
        """The key of an entire tensor held in one piece."""
        shape = tuple(shape)
        return cls(name, kind, shape, (0,) * len(shape), shape, 0, prod(shape))

    def problem(self) -> str | None:
        """Why this key is impossible, or None."""
        if not len(self.global_shape) == len(self.offsets) == len(self.local_shape):
            return (
                f"offsets {self.offsets} and local_shape {self.local_shape} do not fit global_shape {self.global_shape}"
            )
        for size, offset, local in zip(self.global_shape, self.offsets, self.local_shape):
            if offset < 0 or local < 0 or offset + local > size:
                return f"box {self.offsets} + {self.local_shape} leaves the tensor of shape {self.global_shape}"
        if self.flat_start < 0 or self.flat_numel < 0 or self.flat_start + self.flat_numel > prod(self.local_shape):
            return f"{interval(self)} leaves its box of {prod(self.local_shape)} elements"
        return None

    def __str__(self) -> str:
        box = (
            "" if self.local_shape == self.global_shape else f" of box {list(self.offsets)} + {list(self.local_shape)}"
        )
        return f"{self.name} ({self.kind}) {interval(self)}{box}"


def interval(key: PieceKey) -> str:
    """The interval in words, for messages."""
    return f"elements [{key.flat_start}, {key.flat_start + key.flat_numel})"


@dataclass(frozen=True)
class Run:
    """A hyper-rectangle ``lo <= index < hi`` in global coordinates; its elements start at ``flat`` in the flattened box."""

    lo: Shape
    hi: Shape
    flat: int

    @property
    def shape(self) -> Shape:
        return tuple(h - l for l, h in zip(self.lo, self.hi))


def runs(key: PieceKey) -> list[Run]:
    """Cut a piece into its runs, in flat order. A scalar is treated as a vector of one element."""
    shape, offsets = key.local_shape or (1,), key.offsets or (0,)
    return [
        Run(tuple(o + l for o, l in zip(offsets, lo)), tuple(o + h for o, h in zip(offsets, hi)), flat)
        for lo, hi, flat in _split(shape, key.flat_start, key.flat_start + key.flat_numel, 0)
    ]


def _split(shape: Shape, start: int, stop: int, base: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Runs of ``[start, stop)`` of a flattened ``shape``: an incomplete first row, whole rows, an incomplete last row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop,), base + start
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _row(shape, last, start, stop, base)
        return
    if start < first * row:
        yield from _row(shape, first - 1, start, first * row, base)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last, *shape[1:]), base + first * row
    if last * row < stop:
        yield from _row(shape, last, last * row, stop, base)


def _row(shape: Shape, index: int, start: int, stop: int, base: int) -> Iterator[tuple[Shape, Shape, int]]:
    begin = index * prod(shape[1:])
    for lo, hi, flat in _split(shape[1:], start - begin, stop - begin, base + begin):
        yield (index, *lo), (index + 1, *hi), flat


@dataclass(frozen=True)
class Copy:
    """A hyper-rectangle that a source piece and a target piece share.

    On each side: where the run that holds it starts (``*_at``, elements from the start of the *piece*), the run's shape, and
    the rectangle's first index within the run. ``extent`` is the rectangle's own shape.
    """

    source_at: int
    source_shape: Shape
    source_lo: Shape
    target_at: int
    target_shape: Shape
    target_lo: Shape
    extent: Shape

    @property
    def numel(self) -> int:
        return prod(self.extent)

    @property
    def source_span(self) -> tuple[int, int]:
        """First element and one past the last in the source piece; holes between rows included."""
        return _span(self.source_at, self.source_shape, self.source_lo, self.extent)

    @property
    def source_hole(self) -> int:
        """Elements of the source piece between one slice along the first dimension longer than one and the next."""
        axis = next((i for i, n in enumerate(self.extent) if n > 1), len(self.extent) - 1)
        steps = strides(self.source_shape)
        inner = sum((n - 1) * s for n, s in zip(self.extent[axis + 1 :], steps[axis + 1 :])) + 1
        return steps[axis] - inner

    @property
    def target_span(self) -> tuple[int, int]:
        return _span(self.target_at, self.target_shape, self.target_lo, self.extent)

    @property
    def contiguous(self) -> bool:
        """Whether the rectangle is one interval on both sides."""
        return all(end - start == self.numel for start, end in (self.source_span, self.target_span))

    def halves(self) -> tuple["Copy", "Copy"]:
        """Cut in two along the first dimension longer than one."""
        axis = next(i for i, n in enumerate(self.extent) if n > 1)
        half = self.extent[axis] // 2

        def part(shift: int, size: int) -> Copy:
            def move(lo: Shape) -> Shape:
                return (*lo[:axis], lo[axis] + shift, *lo[axis + 1 :])

            extent = (*self.extent[:axis], size, *self.extent[axis + 1 :])
            return Copy(
                self.source_at,
                self.source_shape,
                move(self.source_lo),
                self.target_at,
                self.target_shape,
                move(self.target_lo),
                extent,
            )

        return part(0, half), part(half, self.extent[axis] - half)


def strides(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps))


def _span(at: int, shape: Shape, lo: Shape, extent: Shape) -> tuple[int, int]:
    steps = strides(shape)
    first = at + sum(i * s for i, s in zip(lo, steps))
    return first, first + sum((n - 1) * s for n, s in zip(extent, steps)) + 1


def copies(source: PieceKey, target: PieceKey) -> list[Copy]:
    """Everything of ``target`` that ``source`` holds; empty if they share nothing. Keys must be of one tensor."""
    if source.offsets == target.offsets and source.local_shape == target.local_shape:
        first = max(source.flat_start, target.flat_start)
        last = min(source.flat_start + source.flat_numel, target.flat_start + target.flat_numel)
        if first >= last:
            return []
        n = (last - first,)
        return [Copy(first - source.flat_start, n, (0,), first - target.flat_start, n, (0,), n)]
    if any(
        so + sl <= to or to + tl <= so
        for so, sl, to, tl in zip(source.offsets, source.local_shape, target.offsets, target.local_shape)
    ):
        return []
    found = []
    target_runs = runs(target)
    for s in runs(source):
        for t in target_runs:
            lo, hi = tuple(map(max, s.lo, t.lo)), tuple(map(min, s.hi, t.hi))
            if all(l < h for l, h in zip(lo, hi)):
                found.append(
                    Copy(
                        s.flat - source.flat_start,
                        s.shape,
                        tuple(l - o for l, o in zip(lo, s.lo)),
                        t.flat - target.flat_start,
                        t.shape,
                        tuple(l - o for l, o in zip(lo, t.lo)),
                        tuple(h - l for l, h in zip(lo, hi)),
                    )
                )
    return found
