"""Exact answers by length and depth, as a heat map."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_zebra.report.style import INK, PAPER, figure, look, plain, save

_COLUMNS = 3  # maps side by side


def write_answers(results: dict[str, dict[str, Any]], file: Path) -> Path:
    """``answers_figure`` as a file."""
    with look():
        return save(answers_figure(results), file)


def answers_figure(results: dict[str, dict[str, Any]]) -> Figure:
    """A map of each result (``evaluation.answers.tables``), by name, side by side: lengths upwards, depths to the right.

    A cell that nothing was asked of stays empty.
    """
    lengths = max(len(result["lengths"]) for result in results.values())
    columns = min(_COLUMNS, len(results))
    rows = -(-len(results) // columns)
    drawn = figure(1.2 + 5.6 * columns, rows * (1.6 + 0.55 * lengths))
    all_axes = drawn.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in all_axes[len(results) :]:
        axes.remove()
    shown = None
    for axes, (name, result) in zip(all_axes, results.items()):
        exact = np.array([[np.nan if cell is None else cell for cell in row] for row in result["exact"]], float)
        shown = axes.imshow(exact, aspect="auto", origin="lower", cmap="Blues", vmin=0.0, vmax=1.0)
        whole = result["all"]
        axes.set_title(f"{plain(name)}: {whole['exact']:.0%} of {whole['asked']:,} answers exact")
        for (row, column), value in np.ndenumerate(exact):
            if np.isfinite(value):
                colour = PAPER if value > 0.6 else INK
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.grid(False)
        axes.set_xlabel("depth of the fact in the text")
        axes.set_ylabel("tokens")
        edges = result["depth_edges"]
        axes.set_xticks(np.arange(len(edges)) - 0.5, [f"{edge:.2g}" for edge in edges])
        axes.set_yticks(range(len(result["lengths"])), [f"{length:,}" for length in result["lengths"]])
    if shown is not None:
        drawn.colorbar(shown, ax=all_axes[: len(results)], format=PercentFormatter(1.0))
    return drawn
