#!/usr/bin/env python
"""Draw the pictures of docs/architecture.md: ``python docs/draw.py [FOLDER]`` (default: docs/images).

What is drawn is asked of the functions that training itself asks: the pattern, the plan of context parallelism, the split
of the pipeline, the geometry of checkpoint pieces, the counts of FLOPs and of the KV cache.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from megatron_zebra.attention.window import Window, fetched_range
from megatron_zebra.checkpoint.pieces import PieceKey, runs
from megatron_zebra.config.load import load_config
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.pattern import layer_kinds
from megatron_zebra.parallel.context.layout import ORDERS, Order, owned_spans, stretches
from megatron_zebra.parallel.context.plan import tokens_sent
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.flops import attention_pairs, head_flops, layer_flops, train_flops
from megatron_zebra.planning.kv_cache import kv_cache_bytes
from megatron_zebra.planning.stages import Stages
from megatron_zebra.report.stripes import stripes_figure
from megatron_zebra.report.style import (
    BLUE,
    GLOBAL,
    GREEN,
    INK,
    LOCAL,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    figure,
    look,
    save,
)

RANKS = (BLUE, ORANGE, GREEN, PURPLE)
LLAMA_8B = {  # the shape of Llama-3-8B, for pictures that need one
    "model.hidden_size": 4096,
    "model.num_layers": 32,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.ffn_hidden_size": 14336,
    "model.vocab_size": 128256,
    "model.window_size": 512,
    "data.synthetic.documents": 1,
}


def model(**keys: object) -> Architecture:
    """A Zebra of Llama-3-8B's shape, but for ``keys`` of its section."""
    config = load_config(None, LLAMA_8B | {f"model.{key}": value for key, value in keys.items()})
    return resolve(config.model, config.model.vocab_size or 0, config.data.sequence_length)


# --- what a window saves ----------------------------------------------------------------------------------------------


def cost_figure() -> Figure:
    """A Zebra beside full attention by length of the context: query-key pairs, a training step, the KV cache."""
    lengths = [2**n for n in range(10, 21)]
    drawn = figure(8.5, 2.8)
    pairs, step, cache = drawn.subplots(1, 3, sharex=True)
    full = model(layer_group_size=1)
    for group, colour, marker in ((2, GREEN, "^"), (4, INK, "o"), (8, ORANGE, "s")):
        arch = model(layer_group_size=group)
        for axes, ratios in (
            (pairs, [attention_pairs(arch, [s]) / attention_pairs(full, [s]) for s in lengths]),
            (step, [train_flops(arch, [s]).total / train_flops(full, [s]).total for s in lengths]),
            (cache, [kv_cache_bytes(arch, s, 2) / kv_cache_bytes(full, s, 2) for s in lengths]),
        ):
            axes.plot(lengths, ratios, marker=marker, ms=3, lw=1.5, color=colour, label=f"L = {group}")
            axes.axhline(1 / group, color=colour, lw=0.7, ls=":")
    for axes, title in ((pairs, "Query-key pairs"), (step, "FLOPs of a step"), (cache, "KV cache")):
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**n for n in (10, 13, 17, 20)], ["1k", "8k", "128k", "1M"])
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("tokens of context")
    pairs.set_ylabel("Zebra / full attention")
    step.legend(loc="lower left")
    return drawn


# --- context parallelism ----------------------------------------------------------------------------------------------

CP, TOKENS, WINDOW = 4, 64, 5


def context_figure() -> Figure:
    """What each context-parallel rank holds and fetches, by order of the chunks and kind of layer."""
    drawn = figure(8.5, 3.6)
    grid = drawn.subplots(2, 2)
    for row, order in enumerate(reversed(ORDERS)):
        for column, window in enumerate((WINDOW, None)):
            _draw_context(grid[row, column], order, window)
    return drawn


def _draw_context(axes: Axes, order: Order, window: Window) -> None:
    received = tokens_sent([0, TOKENS], 1, TOKENS, CP, order, window).sum(axis=0)
    for rank, colour in enumerate(RANKS):
        own = np.zeros(TOKENS, dtype=bool)
        for start, stop in owned_spans(rank, CP, 1, TOKENS, order).tolist():
            own[start:stop] = True
        wanted = np.zeros(TOKENS, dtype=bool)
        for start, _ in stretches(rank, CP, 1, TOKENS, order).tolist():
            wanted[slice(*fetched_range(start, 0, window))] = True
        fetched = wanted & ~own
        assert fetched.sum() == received[rank]  # the picture shows what is sent
        for cells, shade in (
            (np.ones(TOKENS, dtype=bool), {"facecolor": "#f1f1f1"}),
            (own, {"facecolor": colour}),
            (fetched, {"facecolor": colour, "alpha": 0.33}),
        ):
            axes.broken_barh(_intervals(cells), (rank + 0.12, 0.76), lw=0, **shade)
        axes.text(TOKENS + 1, rank + 0.5, f"+ {received[rank]}", va="center", fontsize=8, color=MUTED)
    kind = "global layer: all keys before" if window is None else f"local layer, w = {window}"
    axes.set_title(f"{order}, {kind}", fontsize=9)
    axes.set_xlim(0, TOKENS + 7)
    axes.set_ylim(CP, 0)
    axes.set_yticks([rank + 0.5 for rank in range(CP)], [f"rank {rank}" for rank in range(CP)])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _intervals(cells: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each stretch of true cells."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], cells, [False]]).astype(int)))
    return [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


# --- the pipeline -----------------------------------------------------------------------------------------------------


def pipeline_figure() -> Figure:
    """Layers as wide as they cost, cut into four stages: by cost, and into equal counts."""
    drawn = figure(8.5, 2.9)
    axes = drawn.subplots()
    layers, pp = 30, 4
    equal = [layers * (s + 1) // pp - layers * s // pp for s in range(pp)]
    labels = []
    for place, (length, counts) in enumerate((n, c) for n in (4096, 131072) for c in (None, equal)):
        keys = {
            "model.num_layers": layers,
            "model.layer_group_size": 6,
            "parallel.pp": pp,
            "parallel.pp_layers": counts,
        }
        more = {"data.sequence_length": length, "training.global_batch_size": 64}
        config = load_config(None, LLAMA_8B | keys | more)
        arch = resolve(config.model, config.model.vocab_size or 0, length)
        stages = stages_of(config, arch)
        _draw_stages(axes, place, arch, length, stages)
        labels.append(f"{length:,} tokens\n{'equal counts' if counts else 'by cost'}")
    axes.set_xlim(0, 1.13)
    axes.set_ylim(4, -0.05)
    axes.set_yticks([place + 0.3 for place in range(4)], labels)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    shown = [
        Patch(facecolor=GLOBAL, label="global layer"),
        Patch(facecolor=LOCAL, label="local layer"),
        Patch(facecolor=BLUE, label="head"),
    ]
    axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(0.9, 1.0), ncols=3, borderaxespad=0)
    return drawn


def _draw_stages(axes: Axes, place: int, arch: Architecture, length: int, stages: Stages) -> None:
    costs = [flops.times(3).total for flops in layer_flops(arch, [length])]
    head = head_flops(arch, length).times(3).total
    total = sum(costs) + head
    slowest = max(stages.costs)
    at = 0.0
    for number, layers in enumerate(stages.layers):
        began = at
        for layer in layers:
            width = costs[layer] / total
            colour = GLOBAL if arch.window(layer) is None else LOCAL
            axes.add_patch(Rectangle((at, place), width, 0.6, facecolor=colour, edgecolor=PAPER, lw=0.6))
            at += width
        if number == len(stages) - 1:
            axes.add_patch(Rectangle((at, place), head / total, 0.6, facecolor=BLUE, edgecolor=PAPER, lw=0.6))
            at += head / total
        is_slowest = stages.costs[number] == slowest
        axes.plot(
            [began + 0.003, at - 0.003],
            [place + 0.7] * 2,
            color=ORANGE if is_slowest else MUTED,
            lw=3 if is_slowest else 1.2,
        )
    axes.text(
        1.01,
        place + 0.32,
        f"slowest stage\n{stages.slowest_over_mean:.2f} x the mean",
        va="center",
        fontsize=7.5,
        color=MUTED,
    )


# --- checkpoint pieces ------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 5, 12


def checkpoint_figure() -> Figure:
    """One weight as four ranks write it, and as three others read it."""
    drawn = figure(8.5, 2.6)
    before, after = drawn.subplots(1, 2)
    writers = [piece for tp in range(2) for piece in _pieces(tp, 2, 2)]
    readers = _pieces(0, 1, 3)
    _draw_pieces(
        before, "Written under tp 2, dp 2: four files", writers, [f"tp {t}, dp {d}" for t in range(2) for d in range(2)]
    )
    _draw_pieces(after, "Read under tp 1, dp 3: any interval from any pieces", writers, [], readers)
    return drawn


def _pieces(tp_rank: int, tp: int, dp: int) -> list[PieceKey]:
    """How ZeRO's ranks divide one tensor-parallel part of o_proj."""
    shape = (ROWS, COLUMNS)
    box = Sharding(tp, tp_rank).box("layers.0.attention.o_proj.weight", shape)
    ends = [prod(box.shape) * rank // dp for rank in range(dp + 1)]
    return [PieceKey("o_proj", "weight", shape, box.offsets, box.shape, a, b - a) for a, b in pairwise(ends)]


def _cells(piece: PieceKey) -> np.ndarray:
    """Where a piece lies in its tensor: bool [rows, columns]."""
    cells = np.zeros(piece.global_shape, dtype=bool)
    for run in runs(piece):
        cells[tuple(slice(low, high) for low, high in zip(run.lo, run.hi))] = True
    return cells


def _draw_pieces(
    axes: Axes, title: str, pieces: Sequence[PieceKey], names: Sequence[str], readers: Sequence[PieceKey] = ()
) -> None:
    for number, piece in enumerate(pieces):
        for row, column in np.argwhere(_cells(piece)).tolist():
            axes.add_patch(
                Rectangle((column, row), 0.94, 0.9, facecolor=RANKS[number], lw=0, alpha=0.45 if readers else 1)
            )
    for number, reader in enumerate(readers):
        cells = np.argwhere(_cells(reader))
        for row in sorted(set(cells[:, 0].tolist())):
            columns = cells[cells[:, 0] == row][:, 1]
            axes.add_patch(
                Rectangle(
                    (columns.min() + 0.05, row + 0.05),
                    columns.max() - columns.min() + 0.84,
                    0.8,
                    fill=False,
                    edgecolor=INK,
                    lw=1.1,
                )
            )
            axes.text(columns.mean() + 0.47, row + 0.47, f"dp {number}", ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-0.1, COLUMNS)
    axes.set_ylim(ROWS, -0.1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if names:
        handles = [Patch(facecolor=colour, label=name) for colour, name in zip(RANKS, names)]
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=4,
            fontsize=7,
            handlelength=1,
            columnspacing=1,
        )


# --- a step -----------------------------------------------------------------------------------------------------------

MOVES = {"tp": GREEN, "cp": BLUE, "pp": ORANGE, "dp x cp": PURPLE}


def step_figure() -> Figure:
    """What flows where: a training step above, one layer of it below. Boxes compute, arrows of a colour cross ranks."""
    drawn = figure(8.5, 3.7)
    axes = drawn.subplots()
    axes.set_xlim(-0.3, 100.3)
    axes.set_ylim(2, 52)
    axes.axis("off")
    axes.text(0, 50.5, "A step", weight="bold")
    step = [
        ("rows of this\ndp rank, S tokens\nand look-ahead", None),
        ("embedding,\nfirst layers", None),
        ("more layers,\nhead and loss\nchunk by chunk", "pp"),
        ("backward:\ngradients\nsummed in fp32", None),
        ("clip, AdamW\non this rank's\nshard", "dp x cp"),
        ("weights", "dp x cp"),
    ]
    words = ("", "cut over cp", "hidden states", "", "reduce", "gather")
    _chain(axes, step, words, top=46, height=9, width=13)
    axes.text(0, 31.5, "One layer", weight="bold")
    layer = [
        ("[T, h]\nRMSNorm", None),
        ("q, k, v of\nown heads,\nRoPE", "tp"),
        ("keys that the\nmask asks for", "cp"),
        ("kernel:\nw + 1 keys,\nor all", None),
        ("o", None),
        ("add", "tp"),
    ]
    words = ("", "all-gather", "all-to-all", "", "", "reduce-scatter")
    _chain(axes, layer, words, top=27, height=9, width=13)
    mlp = [
        ("RMSNorm", None),
        ("gate, up", "tp"),
        ("SwiGLU", None),
        ("down", None),
        ("add", "tp"),
        ("next layer\n[T, h]", None),
    ]
    words = ("", "all-gather", "", "", "reduce-scatter", "")
    _chain(axes, mlp, words, top=11, height=7, width=13)
    handles = [Patch(facecolor=colour, label=f"between {name} ranks") for name, colour in MOVES.items()]
    axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(1, 1.04), ncols=4, fontsize=7.5, handlelength=1)
    return drawn


def _chain(
    axes: Axes, boxes: Sequence[tuple[str, str | None]], words: Sequence[str], top: float, height: float, width: float
) -> None:
    """Boxes from left to right; before each an arrow, coloured where it goes to other ranks."""
    pitch = (100 - width) / (len(boxes) - 1)
    for number, ((text, moved), word) in enumerate(zip(boxes, words)):
        left = number * pitch
        style = "round,pad=0,rounding_size=1"
        axes.add_patch(
            FancyBboxPatch(
                (left, top - height), width, height, boxstyle=style, facecolor="#f4f4f4", edgecolor=MUTED, lw=0.8
            )
        )
        axes.text(left + width / 2, top - height / 2, text, ha="center", va="center", fontsize=7.5)
        if number:
            colour = MOVES[moved] if moved else MUTED
            ends = ((left - pitch + width + 0.2, top - height / 2), (left - 0.2, top - height / 2))
            axes.add_patch(
                FancyArrowPatch(
                    *ends, arrowstyle="-|>", mutation_scale=9, color=colour, lw=2 if moved else 1, shrinkA=0, shrinkB=0
                )
            )
            axes.text(left - (pitch - width) / 2, top + 0.6, word, ha="center", va="bottom", fontsize=7, color=colour)


PICTURES: dict[str, Callable[[], Figure]] = {
    "stripes": lambda: stripes_figure(layer_kinds(16, 4), 512),
    "cost": cost_figure,
    "context": context_figure,
    "pipeline": pipeline_figure,
    "step": step_figure,
    "checkpoint": checkpoint_figure,
}


def main(folder: Path) -> None:
    """Write every picture into ``folder``."""
    with look():
        for name, draw in PICTURES.items():
            print(save(draw(), folder / f"{name}.svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
