"""The charts of a report, section by section, several runs in one chart.

A chart holds every point that its files hold. One with nothing to show is left out, and says why.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_zebra.report.charts import (
    SMOOTHED_FROM,
    Absent,
    Chart,
    Column,
    all_keys,
    blank,
    column,
    curve,
    labelled,
    style_of,
)
from megatron_zebra.report.context_charts import by_position, over_time, retrieval
from megatron_zebra.report.folder import Run
from megatron_zebra.report.rank_charts import stage_balance, traffic
from megatron_zebra.report.smooth import smooth


@dataclass(frozen=True)
class Section:
    title: str
    charts: list[Chart]
    absent: list[Absent]


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
    Column("save_time", "Saves", "s", note="Waiting for saves since the step before."),
    Column("exchange_time", "Exchange", "s", note="Waiting for other ranks: a part of compute and optimizer."),
)
OPTIMIZER = (
    Column("learning_rate", "Learning rate"),
    Column("grad_norm", "Gradient norm before clipping", log=True),
)
SOURCES = "loss/"


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of the page's charts, in its order."""
    teacher = Column("distill_loss", "Divergence from the teacher", "nats per token", absent="no run has a teacher")
    return [
        _section("Loss", [loss(runs), by_source(runs), column(runs, teacher)]),
        _section("Optimizer", [*(column(runs, of) for of in OPTIMIZER), skipped(runs)]),
        _section("Context", [by_position(runs), *over_time(runs), *retrieval(runs)]),
        _section("Tasks in training", list(tasks(runs))),
        _section("Speed and memory", [column(runs, of) for of in SPEED]),
        _section("Step time and its parts", [column(runs, of) for of in STEP_TIME]),
        _section("Between ranks", [stage_balance(runs), *traffic(runs)]),
    ]


def loss(runs: Sequence[Run]) -> Chart | Absent:
    """Training loss of each step and its running mean, and the held-out sets' losses."""
    title = "Training and held-out loss"
    figure = blank("step")
    sets = all_keys(run.metrics.validation for run in runs)
    for i, run in enumerate(runs):
        values = run.metrics.column("loss")
        if np.isfinite(values).any():
            many = len(values) > SMOOTHED_FROM
            look, name = style_of(runs, i), labelled(runs, i, "training")
            every = curve(run.metrics.steps, values, name, faint=many, **look)
            figure.add_trace(every.update(legendgroup=name, showlegend=not many))
            if many:
                mean = curve(run.metrics.steps, smooth(values), name, **look)
                figure.add_trace(mean.update(legendgroup=name, hoverinfo="skip"))
        for name, (steps, losses) in run.metrics.validation.items():
            look = style_of(runs, i, 1 + sets.index(name))
            figure.add_trace(curve(steps, losses, labelled(runs, i, f"held out: {name}"), marked=True, **look))
    if not figure.data:
        return Absent(title, "no step had a finite loss")
    smoothed = any(len(run.metrics.steps) > SMOOTHED_FROM for run in runs)
    return Chart(
        title, "nats per token", figure, "Training: faint each step, strong the running mean." if smoothed else ""
    )


def by_source(runs: Sequence[Run]) -> Chart | Absent:
    """Training loss of each source of a blend."""
    title = "Training loss by source"
    sources = all_keys(run.metrics.starting(SOURCES) for run in runs)
    figure = blank("step")
    for i, run in enumerate(runs):
        for name, values in run.metrics.starting(SOURCES).items():
            look = style_of(runs, i, sources.index(name))
            figure.add_trace(curve(run.metrics.steps, values, labelled(runs, i, name), **look))
    return Chart(title, "nats per token", figure) if figure.data else Absent(title, "no run has several sources")


def tasks(runs: Sequence[Run]) -> Iterator[Chart | Absent]:
    """The numbers of each of evaluation.tasks over the steps: a chart a task, a line a number."""
    names = list(dict.fromkeys(task.name or task.task for run in runs for task in run.config.evaluation.tasks))
    if not names:
        yield Absent("Tasks", "none ran in training (evaluation.tasks)")
    for name in names:
        found = [run.metrics.starting(f"{name}/") for run in runs]
        numbers, figure = all_keys(found), blank("step")
        for i, columns in enumerate(found):
            for number, values in columns.items():
                there = np.isfinite(values)
                look = style_of(runs, i, numbers.index(number))
                steps = runs[i].metrics.steps[there]
                figure.add_trace(curve(steps, values[there], labelled(runs, i, number), marked=True, **look))
        yield Chart(name, "", figure) if figure.data else Absent(name, "has not run yet (evaluation.tasks)")


def skipped(runs: Sequence[Run]) -> Chart | Absent:
    of = Column("skipped_steps", "Skipped steps", "so far", note="Steps whose loss or gradient was not finite.")
    values = np.concatenate([run.metrics.column(of.column) for run in runs])
    none = np.isfinite(values).any() and not np.nanmax(values)
    return Absent(of.title, "no run skipped a step") if none else column(runs, of)


def _section(title: str, parts: Sequence[Chart | Absent]) -> Section:
    charts = [part for part in parts if isinstance(part, Chart)]
    return Section(title, charts, [part for part in parts if isinstance(part, Absent)])
