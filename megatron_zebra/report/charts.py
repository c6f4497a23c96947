"""The charts of a report, for plotly: several runs in one chart, a run in one colour throughout the page.

A chart holds every point that its files hold. One with nothing to show is left out, and says why.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from megatron_zebra.planning.communication import busiest_bytes
from megatron_zebra.report.folder import Run
from megatron_zebra.report.run import ByPosition, Series
from megatron_zebra.report.smooth import smooth

# After Okabe and Ito; each is told from white as well as from black.
COLOURS = ("#2f86d6", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#8b6fd8")
POSITIONS = ("#3b82f6", "#c04ad1", "#f59e0b")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
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
class Section:
    title: str
    charts: list[Chart]
    absent: list[Absent]


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


SPEED = (
    Column("tokens_per_second", "Throughput", "tokens/s"),
    Column(
        "mfu",
        "MFU, windows counted",
        "%",
        0.01,
        absent="the device's peak is not known (logging.peak_tflops sets it)",
        note="Matrix products and exactly the query-key pairs that the masks allow; recomputation is not counted.",
    ),
    Column("flops_per_second", "Model FLOP/s, windows counted", "GFLOP/s, all processes", 1e9),
    Column("peak_memory_bytes", "Peak memory", "GiB, main process", 2**30),
)
STEP_TIME = (
    Column("step_time", "Whole step", "s"),
    Column("data_time", "Data", "s", note="Waiting for the next batch."),
    Column("compute_time", "Compute", "s", note="Forward and backward."),
    Column("optimizer_time", "Optimizer", "s", note="Reduction, clipping, update."),
    Column("exchange_time", "Exchange", "s", note="Waiting for other ranks: a part of compute and optimizer."),
)
OPTIMIZER = (
    Column("learning_rate", "Learning rate"),
    Column("grad_norm", "Gradient norm before clipping", log=True),
)
SOURCES, BYTES = "loss/", "communication_bytes/"


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of the page's charts, in its order."""
    teacher = Column("distill_loss", "Divergence from the teacher", "nats per token", absent="no run has a teacher")
    return [
        _section("Loss", [loss(runs), by_source(runs), column(runs, teacher)]),
        _section("Optimizer", [*(column(runs, of) for of in OPTIMIZER), skipped(runs)]),
        _section("Context", [by_position(runs), *over_time(runs), *retrieval(runs)]),
        _section("Speed and memory", [column(runs, of) for of in SPEED]),
        _section("Step time and its parts", [column(runs, of) for of in STEP_TIME]),
        _section("Between ranks", [stage_balance(runs), *traffic(runs)]),
    ]


def column(runs: Sequence[Run], of: Column) -> Chart | Absent:
    """A column by step, a line a run."""
    found = [(i, run.metrics.column(of.column) / of.per_unit) for i, run in enumerate(runs)]
    there = [(i, values) for i, values in found if np.isfinite(values).any()]
    if not there:
        return Absent(of.title, of.absent)
    figure = _figure("step")
    for i, values in there:
        figure.add_trace(_line(runs[i].metrics.steps, values, runs[i].name, **_look(runs, i)))
    finite = np.concatenate([values[np.isfinite(values)] for _, values in there])
    if of.log and 0 < finite.min() < finite.max() / 10:
        figure.update_yaxes(LOG_AXIS)
    else:
        figure.update_yaxes(rangemode="tozero", exponentformat="e" if finite.max() < 0.001 else None)
    missing = ", ".join(runs[i].name for i, _ in found if i not in dict(there))
    note = f"Not of {missing}: {of.absent}." if missing else ""
    return Chart(of.title, of.unit, figure, " ".join(filter(None, (of.note, note))))


def loss(runs: Sequence[Run]) -> Chart | Absent:
    """Training loss of each step and its running mean, and the held-out sets' losses."""
    title = "Training and held-out loss"
    figure = _figure("step")
    sets = _names(run.metrics.validation for run in runs)
    for i, run in enumerate(runs):
        values = run.metrics.column("loss")
        if np.isfinite(values).any():
            many = len(values) > SMOOTHED_FROM
            look, name = _look(runs, i), _label(runs, i, "training")
            every = _line(run.metrics.steps, values, name, faint=many, **look)
            figure.add_trace(every.update(legendgroup=name, showlegend=not many))
            if many:
                mean = _line(run.metrics.steps, smooth(values), name, **look)
                figure.add_trace(mean.update(legendgroup=name, hoverinfo="skip"))
        for name, (steps, losses) in run.metrics.validation.items():
            look = _look(runs, i, 1 + sets.index(name))
            figure.add_trace(_line(steps, losses, _label(runs, i, f"held out: {name}"), marked=True, **look))
    if not figure.data:
        return Absent(title, "no step had a finite loss")
    return Chart(title, "nats per token", figure, "Training: faint each step, strong the running mean.")


def by_source(runs: Sequence[Run]) -> Chart | Absent:
    """Training loss of each source of a blend."""
    title = "Training loss by source"
    sources = _names(run.metrics.starting(SOURCES) for run in runs)
    figure = _figure("step")
    for i, run in enumerate(runs):
        for name, values in run.metrics.starting(SOURCES).items():
            look = _look(runs, i, sources.index(name))
            figure.add_trace(_line(run.metrics.steps, values, _label(runs, i, name), **look))
    return Chart(title, "nats per token", figure) if figure.data else Absent(title, "no run has several sources")


def skipped(runs: Sequence[Run]) -> Chart | Absent:
    of = Column("skipped_steps", "Skipped steps", "so far", note="Steps whose loss or gradient was not finite.")
    values = np.concatenate([run.metrics.column(of.column) for run in runs])
    return Absent(of.title, "no run skipped a step") if np.nansum(values) == 0 else column(runs, of)


def by_position(runs: Sequence[Run]) -> Chart | Absent:
    """Loss by position in the document, as tools/evaluate.py and the last evaluation in training found it."""
    title = "Loss by position"
    found = [
        {f"{name}, evaluated": values for name, values in run.evaluated.items()}
        | {f"{name}, last in training": values for name, values in (run.evaluations or [(0, {})])[-1][1].items()}
        for run in runs
    ]
    names = _names(found)
    figure = _figure("tokens before the predicted one")
    for i, sets in enumerate(found):
        for name, values in sets.items():
            centres = [(a + b) / 2 for a, b in pairwise(values.edges)]
            look = _look(runs, i, names.index(name))
            line = _line(np.array(centres), values.loss, _label(runs, i, name), marked=True, **look)
            figure.add_trace(line.update(text=_bins(values)).update(hovertemplate="%{text}: %{y}"))
    if not figure.data:
        return Absent(title, "not evaluated (evaluation.interval, tools/evaluate.py perplexity)")
    edges = sorted({edge for sets in found for values in sets.values() for edge in values.edges if edge})
    figure.update_xaxes(type="log", tickvals=edges, ticktext=[_short(edge) for edge in edges])
    for window in sorted({run.arch.window_size for run in runs if "local" in run.arch.layer_kinds}):
        label = {
            "text": f"window {_short(window)}",
            "textposition": "end",
            "textangle": 0,
            "xanchor": "right",
            "yanchor": "top",
        }
        line = {"dash": "dot", "width": 1, "color": "#888888"}
        figure.add_shape(type="line", x0=window, x1=window, y0=0, y1=1, yref="paper", line=line, label=label)
    return Chart(title, "nats per token", figure)


def over_time(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """Loss by position at each evaluation in training: a chart a set, a line a bin."""
    title = "Loss by position over time"
    names = _names(sets for run in runs for _, sets in run.evaluations)
    if not names:
        yield Absent(title, "no evaluation in training (evaluation.interval)")
    for name in names:
        figure = _figure("step")
        tables = [_by_bin([(step, sets[name]) for step, sets in run.evaluations if name in sets]) for run in runs]
        bins = sorted(_names(tables))
        colours = sample_colorscale(list(POSITIONS), [i / max(1, len(bins) - 1) for i in range(len(bins))])
        for i, table in enumerate(tables):
            for of_bin, points in table.items():
                steps, losses = np.array(points).T
                look = {"colour": colours[bins.index(of_bin)], "dash": DASHES[i % len(DASHES)]}
                span, first = _span(*of_bin), next(j for j, other in enumerate(tables) if of_bin in other)
                line = _line(steps, losses, span, marked=True, **look)
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
    for i, run in enumerate(runs):
        for task, grid in run.answers.items():
            figure = _figure("depth of the fact in the text")
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
            yield Chart(_label(runs, i, f"Answers by length and depth: {task}"), "tokens", figure)


def stage_balance(runs: Sequence[Run]) -> Chart | Absent:
    """What each pipeline stage costs, against their mean."""
    title = "Stage balance"
    figure = _figure("pipeline stage")
    for i, run in enumerate(runs):
        if run.config.parallel.pp > 1 and run.vocabulary:
            costs = np.array(run.stages.costs, dtype=np.float64)
            bar = go.Bar(x=np.arange(len(costs)), y=costs / costs.mean(), name=escape(run.name))
            figure.add_trace(bar.update(marker_color=_look(runs, i)["colour"]))
    figure.update_xaxes(dtick=1)
    note = "FLOPs of a training step at the longest rows, as the split counted them."
    return Chart(title, "cost / mean", figure, note) if figure.data else Absent(title, "no run has a pipeline")


def traffic(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """Bytes that came from other ranks, by what they are for; those of context parallelism by kind of layer."""
    yield bytes_by_kind(runs)
    for name in _names(map(_received, runs)):
        title, unit = f"Bytes received: {name}", "MiB a step, main process"
        yield column(runs, Column(f"{BYTES}{name}", title, unit, 2**20, absent="it received none"))


def bytes_by_kind(runs: Sequence[Run]) -> Chart | Absent:
    """The mean step's, measured, beside those of the plan."""
    title = "Bytes by layer kind"
    figure = _figure("")
    for i, run in enumerate(runs):
        measured = {name: float(np.nanmean(values)) for name, values in _received(run).items()}
        for name, values, symbol in (("measured", measured, "circle"), ("planned", _planned(run), "circle-open")):
            found = {kind: value / 2**20 for kind, value in values.items() if value}
            colour = _look(runs, i)["colour"]
            if found:
                dot = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": colour}}
                x, y, label = list(found), list(found.values()), _label(runs, i, name)
                figure.add_trace(go.Scatter(x=x, y=y, mode="markers", name=label, marker=dot))
    note = (
        "cp: keys and values, by kind of layer. Measured: mean over steps, main process, without what DeepSpeed moves "
        "itself (data, from ZeRO-1 on). Planned: the busiest rank, every row whole and one document."
    )
    if not figure.data:
        return Absent(title, "no run is known to have had other ranks to receive from")
    drawn = np.concatenate([trace.y for trace in figure.data])
    figure.update_yaxes(LOG_AXIS, range=[np.log10(drawn.min() / 3), np.log10(drawn.max() * 3)])
    return Chart(title, "MiB a step", figure, note)


def _received(run: Run) -> dict[str, Series]:
    """Measured bytes of each step by kind; gradients and weights are counted only where DeepSpeed does not move them."""
    partial = "data" if run.config.optimizer.zero_stage else ""
    return {name: values for name, values in run.metrics.starting(BYTES).items() if name != partial and values.any()}


def _planned(run: Run) -> Mapping[str, int]:
    if run.layout is None or not run.vocabulary:
        return {}
    return busiest_bytes(run.arch, run.config, run.layout, run.stages)


def _section(title: str, parts: Sequence[Chart | Absent]) -> Section:
    charts = [part for part in parts if isinstance(part, Chart)]
    return Section(title, charts, [part for part in parts if isinstance(part, Absent)])


def _figure(x_title: str) -> go.Figure:
    """Empty; the page's script sets all that depends on the screen, and the colours of what is no data."""
    return go.Figure(layout={"template": {}, "xaxis": {"title": {"text": x_title}}})


def _line(
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


def _look(runs: Sequence[Run], run: int, item: int = 0) -> dict[str, Any]:
    """A run's colour, and a dash for each of its lines in one chart; a single run's lines have colours instead."""
    colour, dash = (item, 0) if len(runs) == 1 else (run, item)
    return {"colour": COLOURS[colour % len(COLOURS)], "dash": DASHES[dash % len(DASHES)]}


def _label(runs: Sequence[Run], run: int, item: str) -> str:
    """A line's name; plotly reads HTML in it."""
    return escape(item if len(runs) == 1 else f"{runs[run].name}: {item}")


def _names(found: Iterable[Mapping[Key, Any]]) -> list[Key]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in found for key in mapping))


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


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
