"""All pictures of a run folder."""

from pathlib import Path

from matplotlib.figure import Figure

from megatron_zebra.model.architecture import Architecture
from megatron_zebra.report import curves
from megatron_zebra.report.run import ByPosition, Metrics, read_architecture, read_by_position, read_metrics
from megatron_zebra.report.stripes import draw_stripes, stripes_figure
from megatron_zebra.report.style import MUTED, figure, look, plain, save

EVALUATION = Path("evaluation") / "perplexity.json"


def write_plots(run_dir: Path) -> list[Path]:
    """Write ``run_dir``/plots: loss.png, stripes.png, overview.png, and loss_by_position.png once it was evaluated.

    Raises:
        UserError: a file of the run is missing, empty or damaged.
    """
    metrics, arch = read_metrics(run_dir / "metrics.jsonl"), read_architecture(run_dir)
    sets = read_by_position(run_dir / EVALUATION) if (run_dir / EVALUATION).exists() else {}
    folder = run_dir / "plots"
    with look():
        written = [save(loss_figure(metrics), folder / "loss.png")]
        if sets:
            written.append(save(by_position_figure(sets, _window(arch)), folder / "loss_by_position.png"))
        written.append(save(stripes_figure(arch.layer_kinds, arch.window_size), folder / "stripes.png"))
        written.append(save(overview_figure(run_dir.name, metrics, sets, arch), folder / "overview.png"))
    return written


def loss_figure(metrics: Metrics) -> Figure:
    """The loss, and beside it learning rate, gradient norm and speed."""
    drawn = figure(10.0, 5.0)
    grid = drawn.add_gridspec(3, 2, width_ratios=[1.8, 1])
    curves.draw_loss(drawn.add_subplot(grid[:, 0]), metrics)
    small = (curves.draw_learning_rate, curves.draw_gradient_norm, curves.draw_speed)
    for row, draw in enumerate(small):
        axes = drawn.add_subplot(grid[row, 1])
        draw(axes, metrics)
        if row < len(small) - 1:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("step")
    return drawn


def by_position_figure(sets: dict[str, ByPosition], window: int | None) -> Figure:
    drawn = figure(7.0, 4.0)
    curves.draw_by_position(drawn.add_subplot(), sets, window)
    return drawn


def overview_figure(name: str, metrics: Metrics, sets: dict[str, ByPosition], arch: Architecture) -> Figure:
    """What one wants to see first: how it learned, how it uses its context, what it is."""
    drawn = figure(11.0, 5.2)
    grid = drawn.add_gridspec(2, 2, height_ratios=[4, 0.5])
    curves.draw_loss(drawn.add_subplot(grid[0, 0]), metrics)
    curves.draw_by_position(drawn.add_subplot(grid[0, 1]), sets, _window(arch))
    draw_stripes(drawn.add_subplot(grid[1, :]), arch.layer_kinds)
    tokens = metrics.column("consumed_tokens")[-1]
    seen = f", {tokens / 1e6:,.2f} million tokens" if tokens == tokens else ""
    drawn.suptitle(
        f"{plain(name)}: {int(metrics.steps[-1]):,} steps{seen}", x=0.01, ha="left", color=MUTED, fontsize=10
    )
    return drawn


def _window(arch: Architecture) -> int | None:
    return arch.window_size if "local" in arch.layer_kinds else None
