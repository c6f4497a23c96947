"""Curves of a run, each drawn into axes that the caller gives."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, ScalarFormatter

from megatron_zebra.report.counts import short
from megatron_zebra.report.run import ByPosition, Metrics, Series
from megatron_zebra.report.smooth import smooth
from megatron_zebra.report.style import BLUE, INK, MARKERS, MUTED, SERIES, SKY, empty, plain


def draw_loss(axes: Axes, metrics: Metrics) -> None:
    """Training loss of each step and its mean, validation losses, and the steps whose loss was not finite."""
    loss = metrics.column("loss")
    axes.set_title("Loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    finite = np.isfinite(loss)
    if not finite.any():
        empty(axes, "no finite loss")
        return
    many = finite.sum() > 20
    axes.plot(
        metrics.steps,
        loss,
        color=SKY if many else BLUE,
        lw=0.7 if many else 1.6,
        marker=None if many else ".",
        label="training, each step",
    )
    if many:
        axes.plot(metrics.steps, smooth(loss), color=BLUE, lw=1.8, label="training, running mean")
    for i, (name, (steps, losses)) in enumerate(metrics.validation.items()):
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        axes.plot(
            steps,
            losses,
            color=colour,
            marker=marker,
            ms=5,
            lw=1.2,
            clip_on=False,
            zorder=3,
            label=f"held out: {plain(name)} ({losses[-1]:.3f})",
        )
    if not finite.all():
        bad = metrics.steps[~finite]
        axes.plot(
            bad,
            np.full(len(bad), 0.02),
            "x",
            color=INK,
            ms=5,
            transform=axes.get_xaxis_transform(),
            label=f"not finite ({len(bad)} steps)",
        )
    _steps(axes, metrics)
    axes.legend(loc="upper right")


def draw_learning_rate(axes: Axes, metrics: Metrics) -> None:
    _small(axes, metrics, "learning_rate", "Learning rate", "")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def draw_gradient_norm(axes: Axes, metrics: Metrics) -> None:
    """Before clipping; on a log axis, since its spikes are what one looks for."""
    values = _small(axes, metrics, "grad_norm", "Gradient norm before clipping", "")
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive):
        axes.set_yscale("log")
        if positive.max() < 30 * positive.min():
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())


def draw_speed(axes: Axes, metrics: Metrics) -> None:
    values = _small(axes, metrics, "tokens_per_second", "Speed", "tokens/s")
    if np.isfinite(values).any():
        axes.set_ylim(0, 1.15 * np.nanmax(values))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def draw_by_position(axes: Axes, sets: dict[str, ByPosition], window: int | None) -> None:
    """Loss by position in the document; bins double in width, so they stand at equal distances.

    Args:
        window: marked where local layers begin to lose sight of the document's start.
    """
    axes.set_title("Loss by position in the document")
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel("nats per token")
    if not any(np.isfinite(values.loss).any() for values in sets.values()):
        empty(axes, "not evaluated")
        return
    longest = max((values.edges for values in sets.values()), key=len)
    for i, (name, values) in enumerate(sets.items()):
        centres = np.array([_place((a + b) / 2, longest) for a, b in zip(values.edges, values.edges[1:])])
        axes.plot(
            centres,
            values.loss,
            color=SERIES[i % len(SERIES)],
            marker=MARKERS[i % len(MARKERS)],
            ms=5,
            lw=1.6,
            ls=("-", "--", ":")[i // len(SERIES) % 3],
            label=plain(name),
        )
    axes.set_xticks(range(len(longest)), [short(edge) for edge in longest])
    axes.set_xlim(0, len(longest) - 1)
    if window is not None and longest[0] < window < longest[-1]:
        axes.axvline(_place(window, longest), color=MUTED, lw=1.2, ls="--")
        axes.annotate(
            f" window {short(window)}",
            (_place(window, longest), 1),
            xycoords=("data", "axes fraction"),
            va="top",
            color=MUTED,
        )
    if len(sets) > 1:
        axes.legend(loc="best")


def _place(position: float, edges: list[int]) -> float:
    """Where ``position`` stands on an axis on which ``edges`` are at 0, 1, 2, ..."""
    return float(np.interp(position, edges, np.arange(len(edges))))


def _small(axes: Axes, metrics: Metrics, column: str, title: str, unit: str) -> Series:
    values = metrics.column(column)
    axes.set_title(title)
    axes.set_ylabel(unit)
    if np.isfinite(values).any():
        axes.plot(metrics.steps, values, color=BLUE, lw=1.0, marker="." if len(values) <= 20 else None)
        _steps(axes, metrics)
    else:
        empty(axes, "not recorded")
    return values


def _steps(axes: Axes, metrics: Metrics) -> None:
    first, last = metrics.steps[0], metrics.steps[-1]
    if last > first:
        axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
