"""How the runs use their context: loss by position, answers by length and depth."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from megatron_zebra.report.charts import DASHES, Absent, Chart, all_keys, blank, curve, labelled, style_of
from megatron_zebra.report.counts import short
from megatron_zebra.report.folder import Run
from megatron_zebra.report.run import ByPosition

POSITIONS = ("#3b82f6", "#c04ad1", "#f59e0b")


def by_position(runs: Sequence[Run]) -> Chart | Absent:
    """Loss by position in the document, as tools/evaluate.py and the last evaluation in training found it."""
    title = "Loss by position"
    found = [
        {f"{name}, evaluated": values for name, values in run.evaluated.items()}
        | {f"{name}, last in training": values for name, values in (run.evaluations or [(0, {})])[-1][1].items()}
        for run in runs
    ]
    names = all_keys(found)
    figure = blank("tokens before the predicted one")
    for i, sets in enumerate(found):
        for name, values in sets.items():
            centres = [(a + b) / 2 for a, b in pairwise(values.edges)]
            look = style_of(runs, i, names.index(name))
            line = curve(np.array(centres), values.loss, labelled(runs, i, name), marked=True, **look)
            figure.add_trace(line.update(text=_bins(values)).update(hovertemplate="%{text}: %{y}"))
    if not figure.data:
        return Absent(title, "not evaluated (evaluation.interval, tools/evaluate.py perplexity)")
    edges = sorted({edge for sets in found for values in sets.values() for edge in values.edges if edge})
    figure.update_xaxes(type="log", tickvals=edges, ticktext=[short(edge) for edge in edges])
    for i, window in enumerate(sorted({run.arch.window_size for run in runs if "local" in run.arch.layer_kinds})):
        label = {
            "text": f"window {short(window)}",
            "textposition": "end",
            "textangle": 0,
            "xanchor": "right",
            "yanchor": "top",
        }
        line = {"dash": "dot", "width": 1, "color": "#888888"}
        top = 1 - 0.08 * (i % 8)  # names of windows near each other stand one below the other
        figure.add_shape(type="line", x0=window, x1=window, y0=0, y1=top, yref="paper", line=line, label=label)
    return Chart(title, "nats per token", figure)


def over_time(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """Loss by position at each evaluation in training: a chart a set, a line a bin."""
    title = "Loss by position over time"
    names = all_keys(sets for run in runs for _, sets in run.evaluations)
    if not names:
        yield Absent(title, "no evaluation in training (evaluation.interval)")
    for name in names:
        figure = blank("step")
        tables = [_by_bin([(step, sets[name]) for step, sets in run.evaluations if name in sets]) for run in runs]
        bins = sorted(all_keys(tables))
        colours = sample_colorscale(list(POSITIONS), [i / max(1, len(bins) - 1) for i in range(len(bins))])
        for i, table in enumerate(tables):
            for of_bin, points in table.items():
                steps, losses = np.array(points).T
                look = {"colour": colours[bins.index(of_bin)], "dash": DASHES[i % len(DASHES)]}
                span, first = _span(*of_bin), next(j for j, other in enumerate(tables) if of_bin in other)
                line = curve(steps, losses, span, marked=True, **look)
                whose = f" {escape(runs[i].name)}" if len(runs) > 1 else ""
                line.update(legendgroup=span, showlegend=i == first, hovertemplate=f"%{{y}}{whose}")
                figure.add_trace(line)
        note = "A line for each range of positions."
        if len(runs) > 1:
            note += "".join(f" {DASHES[i % len(DASHES)].capitalize()}: {run.name}." for i, run in enumerate(runs))
        yield Chart(f"{title}: {name}", "nats per token", figure, note)


def retrieval(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """Heat maps of exact answers: a chart a run and task."""
    if not any(run.answers for run in runs):
        yield Absent("Answers by length and depth", "not evaluated (tools/evaluate.py answers, retrieval)")
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        for task, grid in run.answers.items():
            figure = blank("depth of the fact in the text")
            figure.add_trace(
                go.Heatmap(
                    x=grid.depths,
                    y=grid.lengths,
                    z=grid.exact,
                    zmin=0,
                    zmax=1,
                    colorscale="Cividis",
                    texttemplate="%{z:.0%}",
                    hovertemplate="%{y} tokens, depth %{x}: %{z:.1%}<extra></extra>",
                    showscale=False,
                )
            )
            figure.update_xaxes(type="category", showgrid=False, ticks="")
            figure.update_yaxes(type="category", showgrid=False, ticks="", ticklabelstandoff=4)
            figure.update_layout(hovermode="closest")
            yield Chart(f"{whose}Answers by length and depth: {task}", "tokens", figure)


def _by_bin(evaluations: Sequence[tuple[int, ByPosition]]) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Steps and losses of each range of positions (bounds as in ByPosition); a run's edges change with its length."""
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for step, values in evaluations:
        for bounds, loss in zip(pairwise(values.edges), values.loss.tolist()):
            found.setdefault(bounds, []).append((step, loss))
    return found


def _bins(values: ByPosition) -> list[str]:
    return [_span(a, b) for a, b in pairwise(values.edges)]


def _span(start: int, stop: int) -> str:
    return f"{start:,}–{stop - 1:,}"
