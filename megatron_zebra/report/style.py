"""One look for all pictures: figures without global state, and colours that colour-blind readers can tell apart."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, darkest contrasts first.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = (VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v")
INK, PAPER, GRID, MUTED = "#1a1a1a", "#ffffff", "#dddddd", "#666666"
GLOBAL, LOCAL = INK, "#d9d9d9"

_LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "svg.hashsalt": "megatron-zebra",
}


@contextmanager
def look() -> Iterator[None]:
    """Draw within this."""
    with matplotlib.rc_context(_LOOK):
        yield


def figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, that no interactive backend knows of."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(drawn: Figure, path: Path) -> Path:
    """Write by the path's suffix; a reader never sees half a picture, and the same picture has the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    drawn.savefig(temporary, format=path.suffix[1:], metadata=metadata)
    os.replace(temporary, path)
    return path


def plain(name: str) -> str:
    """A name that somebody chose, as matplotlib shows it letter by letter: between two $ it reads mathematics, and a legend
    leaves out what begins with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def empty(axes: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)
