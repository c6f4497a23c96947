"""What passes between ranks, and how evenly stages share the work."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from megatron_zebra.planning.communication import busiest_bytes
from megatron_zebra.report.charts import LOG_AXIS, Absent, Chart, Column, all_keys, blank, column, labelled, style_of
from megatron_zebra.report.folder import Run
from megatron_zebra.report.run import Series

BYTES = "communication_bytes/"


def stage_balance(runs: Sequence[Run]) -> Chart | Absent:
    """What each pipeline stage costs, against their mean."""
    title = "Stage balance"
    figure = blank("pipeline stage")
    for i, run in enumerate(runs):
        if run.config.parallel.pp > 1 and run.vocabulary:
            costs = np.array(run.stages.costs, dtype=np.float64)
            bar = go.Bar(x=np.arange(len(costs)), y=costs / costs.mean(), name=escape(run.name))
            figure.add_trace(bar.update(marker_color=style_of(runs, i)["colour"]))
    figure.update_xaxes(dtick=1)
    note = "FLOPs of a training step at the longest rows, as the split counted them."
    return Chart(title, "cost / mean", figure, note) if figure.data else Absent(title, "no run has a pipeline")


def traffic(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """Bytes that came from other ranks, by what they are for; those of context parallelism by kind of layer."""
    yield bytes_by_kind(runs)
    for name in all_keys(map(_received, runs)):
        title, unit = f"Bytes received: {name}", "MiB a step, main process"
        yield column(runs, Column(f"{BYTES}{name}", title, unit, 2**20, absent="it received none"))


def bytes_by_kind(runs: Sequence[Run]) -> Chart | Absent:
    """The mean step's, measured, beside those of the plan."""
    title = "Bytes by layer kind"
    figure = blank("")
    for i, run in enumerate(runs):
        measured = {name: float(np.nanmean(values)) for name, values in _received(run).items()}
        for name, values, symbol in (("measured", measured, "circle"), ("planned", _planned(run), "circle-open")):
            found = {kind: value / 2**20 for kind, value in values.items() if value > 0}
            colour = style_of(runs, i)["colour"]
            if found:
                dot = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": colour}}
                x, y, label = list(found), list(found.values()), labelled(runs, i, name)
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
