"""The stripes that give Zebra its name: which layers are global, and what each kind of layer sees."""

from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from megatron_zebra.model.pattern import LayerKind
from megatron_zebra.report.style import GLOBAL, INK, LOCAL, MUTED, PAPER, figure, look, save

MASK_TOKENS = 16
MASK_WINDOW = 4


def stripes_figure(kinds: Sequence[LayerKind], window: int) -> Figure:
    """The layers as stripes, beside what a query sees in a global and in a local layer."""
    drawn = figure(8.5, 2.5)
    layers, whole, banded = drawn.subplots(1, 3, width_ratios=[2.6, 1, 1])
    draw_stripes(layers, kinds)
    draw_mask(whole, None, "Global layer:\nall keys before")
    draw_mask(banded, MASK_WINDOW, f"Local layer:\nitself and {window:,} before")
    return drawn


def write_stripes(file: FilePath, kinds: Sequence[LayerKind], window: int) -> FilePath:
    """``stripes_figure`` as a file."""
    with look():
        return save(stripes_figure(kinds, window), file)


def draw_stripes(axes: Axes, kinds: Sequence[LayerKind]) -> None:
    """One stripe a layer, layer 0 at the left."""
    count = len(kinds)
    for layer, kind in enumerate(kinds):
        axes.add_patch(
            Rectangle(
                (layer, 0),
                1,
                1,
                facecolor=GLOBAL if kind == "global" else LOCAL,
                edgecolor=PAPER,
                lw=1.5 if count <= 48 else 0.3,
            )
        )
    axes.set_xlim(0, count)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    step = max(1, -(-count // 16))
    shown = range(0, count, step)
    axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    number = sum(kind == "global" for kind in kinds)
    axes.set_title("Layers")
    handles = [
        Patch(facecolor=GLOBAL, label=f"{number} global"),
        Patch(facecolor=LOCAL, label=f"{count - number} local"),
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 0.995), ncols=2, borderaxespad=0, handlelength=1)


def draw_mask(axes: Axes, window: int | None, title: str) -> None:
    """A small mask: query i (row) sees key j (column) where it is dark. A picture of the rule, not to scale."""
    i, j = np.arange(MASK_TOKENS)[:, None], np.arange(MASK_TOKENS)[None, :]
    seen = (j <= i) & (True if window is None else j >= i - window)
    for cells, colour in ((~seen, "#f1f1f1"), (seen, INK)):
        squares = [
            Path.unit_rectangle().transformed(Affine2D().scale(0.9).translate(x, y)) for y, x in np.argwhere(cells)
        ]
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), facecolor=colour, lw=0))
    axes.set_xlim(0, MASK_TOKENS)
    axes.set_ylim(MASK_TOKENS, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("keys", color=MUTED)
    axes.set_ylabel("queries", color=MUTED)
