"""How far back each layer looks, drawn."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_zebra.report.style import GLOBAL, LOCAL, MARKERS, SERIES, figure, look, save


def write_profile(
    file: Path, windows: list[int], by_layer: np.ndarray, by_head: np.ndarray, window: int, chosen: Collection[int]
) -> Path:
    """``profile_figure`` as a file."""
    with look():
        return save(profile_figure(windows, by_layer, by_head, window, chosen), file)


def profile_figure(
    windows: list[int], by_layer: np.ndarray, by_head: np.ndarray, window: int, chosen: Collection[int]
) -> Figure:
    """Attention beyond each window by layer; below it every head's, beyond ``window``.

    Args:
        by_layer: share of attention [windows, layers]. by_head: that beyond ``window`` [layers, heads].
        chosen: the layers drawn dark, which would stay global.
    """
    layers, heads = by_head.shape
    drawn = figure(9.0, 6.0)
    top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    place = np.arange(layers)
    at = windows.index(window)
    colours = [GLOBAL if layer in chosen else LOCAL for layer in place]
    top.bar(place, by_layer[at], color=colours, width=0.8, label=f"beyond {window:,} (dark: would stay global)")
    others = [i for i in range(len(windows)) if i != at]
    for number, i in enumerate(others):
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        top.plot(place, by_layer[i], color=colour, marker=marker, ms=4, lw=1.2, label=f"beyond {windows[i]:,}")
    top.set_title("Attention beyond the window, mean over heads")
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    top.set_ylim(bottom=0)
    top.legend(loc="best")
    shown = bottom.imshow(
        by_head.T, aspect="auto", origin="lower", cmap="Greys", vmin=0.0, vmax=max(float(by_head.max()), 1e-9)
    )
    bottom.set_title(f"Each head's, beyond {window:,}")
    bottom.set_xlabel("layer")
    bottom.set_ylabel("head")
    bottom.grid(False)
    bottom.set_yticks(range(0, heads, max(1, heads // 8)))
    drawn.colorbar(shown, ax=bottom, format=PercentFormatter(1.0))
    return drawn
