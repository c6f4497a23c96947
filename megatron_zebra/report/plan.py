"""A plan by sequence length, drawn."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from megatron_zebra.planning.search import Plan
from megatron_zebra.report.counts import short
from megatron_zebra.report.style import GLOBAL, LOCAL, figure, look, save


def write_lengths(file: Path, found: Mapping[int, tuple[Plan, Plan]], memory_bytes: int) -> Path:
    """``lengths_figure`` as a file."""
    with look():
        return save(lengths_figure(found, memory_bytes), file)


def lengths_figure(found: Mapping[int, tuple[Plan, Plan]], memory_bytes: int) -> Figure:
    """Speed and memory of a Zebra and of full attention by sequence length; ``memory_bytes`` of a GPU is a line."""
    lengths = list(found)
    drawn = figure(9.0, 3.6)
    speed, memory = drawn.subplots(1, 2)
    for number, (name, colour) in enumerate((("Zebra", GLOBAL), ("all layers full", LOCAL))):
        plans = [found[length][number] for length in lengths]
        speed.plot(lengths, [plan.time.tokens_per_second for plan in plans], "o-", color=colour, label=name)
        memory.plot(lengths, [plan.memory.total / 2**30 for plan in plans], "o-", color=colour, label=name)
    speed.set_title("Tokens/s, predicted")
    memory.set_title("GiB of a GPU, planned")
    memory.axhline(memory_bytes / 2**30, color="grey", lw=0.8, ls="--", label="of the GPU")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, list(map(short, lengths)))
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xlabel("tokens a row")
        axes.legend(loc="best")
    return drawn
