"""What every chart of a report is made of, for plotly: a run has one colour throughout the page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go

from megatron_zebra.report.folder import Run
from megatron_zebra.report.run import Series

# After Okabe and Ito; each is told from white as well as from black.
COLOURS = ("#2f86d6", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#8b6fd8")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LOG_AXIS = {"type": "log", "dtick": "D2"}
SMOOTHED_FROM = 20
Key = TypeVar("Key")


@dataclass(frozen=True)
class Chart:
    """``note``: what a reader must know beside the title."""

    title: str
    unit: str
    figure: go.Figure
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A chart that is left out."""

    title: str
    reason: str


@dataclass(frozen=True)
class Column:
    """A chart of one column of metrics.jsonl.

    per_unit: the column's value of one ``unit``.
    absent: why it may be missing.
    """

    column: str
    title: str
    unit: str = ""
    per_unit: float = 1
    log: bool = False
    absent: str = "not recorded"
    note: str = ""


def column(runs: Sequence[Run], of: Column) -> Chart | Absent:
    """A column by step, a line a run."""
    found = [(i, run.metrics.column(of.column) / of.per_unit) for i, run in enumerate(runs)]
    there = [(i, values) for i, values in found if np.isfinite(values).any()]
    if not there:
        return Absent(of.title, of.absent)
    figure = blank("step")
    for i, values in there:
        figure.add_trace(curve(runs[i].metrics.steps, values, escape(runs[i].name), **style_of(runs, i)))
    finite = np.concatenate([values[np.isfinite(values)] for _, values in there])
    if of.log and 0 < finite.min() < finite.max() / 10:
        figure.update_yaxes(LOG_AXIS)
    else:
        figure.update_yaxes(rangemode="tozero", exponentformat="e" if finite.max() < 0.001 else None)
    missing = ", ".join(runs[i].name for i, _ in found if i not in dict(there))
    note = f"Not of {missing}: {of.absent}." if missing else ""
    return Chart(of.title, of.unit, figure, " ".join(filter(None, (of.note, note))))


def blank(x_title: str) -> go.Figure:
    """Empty; the page's script sets all that depends on the screen, and the colours of what is no data."""
    return go.Figure(layout={"template": {}, "xaxis": {"title": {"text": x_title}}})


def curve(
    x: Series, y: Series, name: str, *, colour: str, dash: str, faint: bool = False, marked: bool = False
) -> go.Scatter:
    """Four bytes a number: a page of long runs stays small, and no screen shows more."""
    return go.Scatter(
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        name=name,
        mode="lines+markers" if marked or len(x) <= SMOOTHED_FROM else "lines",
        opacity=0.35 if faint else 1,
        line={"color": colour, "dash": dash, "width": 1 if faint else 1.7},
    )


def style_of(runs: Sequence[Run], run: int, item: int = 0) -> dict[str, Any]:
    """A run's colour, and a dash for each of its lines in one chart; a single run's lines have colours instead.

    Where there are more than there are colours, they begin again with the next dash.
    """
    colour, dash = (item, 0) if len(runs) == 1 else (run, item)
    dash += colour // len(COLOURS)
    return {"colour": COLOURS[colour % len(COLOURS)], "dash": DASHES[dash % len(DASHES)]}


def labelled(runs: Sequence[Run], run: int, item: str) -> str:
    """A line's name; plotly reads HTML in it."""
    return escape(item if len(runs) == 1 else f"{runs[run].name}: {item}")


def all_keys(found: Iterable[Mapping[Key, Any]]) -> list[Key]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in found for key in mapping))
