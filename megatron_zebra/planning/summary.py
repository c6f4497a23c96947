"""What a dry run prints. No torch: it answers before torch could be imported."""

import itertools
from collections.abc import Sequence
from math import prod

from megatron_zebra.config.derived import longest_sequence, ranks_per_replica
from megatron_zebra.config.load import to_yaml
from megatron_zebra.config.sections import Config, Training
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import cells, stripes
from megatron_zebra.parallel.context.layout import stretches
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.planning.communication import busiest_bytes, context_bytes
from megatron_zebra.planning.flops import (
    CONVENTION,
    forward_flops,
    full_attention_flops,
    recompute_flops,
    train_flops,
    uncut_flops,
)
from megatron_zebra.planning.memory import memory_by_rank, saved_bytes
from megatron_zebra.planning.parameters import parameter_count, trained_count
from megatron_zebra.planning.stages import Stages


def dry_run_text(
    config: Config,
    arch: Architecture,
    world_size: int,
    stages: Stages,
    notes: Sequence[str] = (),
    teacher: Architecture | None = None,
) -> str:
    """The resolved configuration and what it comes to: layers, parameters, who is where and does what, memory, bytes
    between ranks, FLOPs, tokens.

    Args:
        stages: of the pipeline (``pipeline.split.stages_of``).
        notes: how the model differs from the one that the run begins from.
        teacher: of a distillation.
    """
    parallel = config.parallel
    layout = Layout.of(world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    sections = [
        ("resolved configuration", to_yaml(config).rstrip().splitlines()),
        *([(f"begins from {config.checkpoint.load}", [f"  {note}" for note in notes])] if notes else []),
        ("layers", [*stripes(arch.layer_kinds, arch.window_size).splitlines(), *_stages(arch, stages)]),
        ("parameters", _parameters(arch, config.training)),
        (f"ranks: {world_size}" + (f" = {layout}" if world_size > 1 else ""), _ranks(config, layout)),
        (_memory_title(config), _memory(config, arch, layout, stages, teacher)),
        *([(_bytes_title(config), _communication(config, arch, layout, stages))] if world_size > 1 else []),
        (_flops_title(config), _flops(config, arch)),
        ("tokens", _tokens(config)),
    ]
    return "\n\n".join("\n".join([f"# {title}", *lines]) for title, lines in sections)


def run_tokens(config: Config) -> int:
    """Tokens of the whole run, the ramp of the batch and the schedule of lengths counted. A row is S tokens."""
    edges = {0, config.training.steps}
    lengths = [(phase.steps, phase.sequence_length) for phase in config.data.sequence_schedule]
    batches = [(phase.steps, phase.global_batch_size) for phase in config.training.batch_ramp]
    for phases in (lengths, batches):
        done = 0
        for steps, _ in phases:
            done += steps
            edges.add(min(done, config.training.steps))
    ordered = sorted(edges)
    total = 0
    for start, end in itertools.pairwise(ordered):
        length = _value_at(start, lengths, config.data.sequence_length)
        total += (end - start) * length * _value_at(start, batches, config.training.global_batch_size)
    return total


def _value_at(step: int, phases: list[tuple[int, int]], afterwards: int) -> int:
    for steps, value in phases:
        if step < steps:
            return value
        step -= steps
    return afterwards


def _parameters(arch: Architecture, training: Training) -> list[str]:
    shapes = arch.parameter_shapes()
    embedding = prod(shapes["embedding.weight"])
    head = prod(shapes.get("head.weight", (0,)))
    total, trained = parameter_count(arch), trained_count(arch, training)
    note = f"adapters of rank {training.lora.rank} among them" if training.lora.rank else f"{trained / total:.1%}"
    return _table(
        [
            ("total", f"{total:,}", ""),
            ("embedding", f"{embedding:,}", "also the head's weight" if arch.tie_embeddings else ""),
            *([("head", f"{head:,}", "")] if head else []),
            ("non-embedding", f"{total - embedding - head:,}", f"{arch.num_layers} layers"),
            *([("trained", f"{trained:,}", note)] if trained != total else []),
        ]
    )


def _stages(arch: Architecture, stages: Stages) -> list[str]:
    """Who holds which layers in a pipeline."""
    if len(stages) == 1:
        return []
    mean = sum(stages.costs) / len(stages)
    lines = ["  stage  rank  cost / mean  layers"]
    shown = _some(len(stages), 16)
    for stage in shown:
        if stage is None:
            lines.append("    ...")
            continue
        held = stages.layers[stage]
        numbers = f"{held[0]}-{held[-1]}" if len(held) > 1 else f"{held[0]}"
        pattern = cells([arch.layer_kinds[layer] for layer in held])
        ends = (" + embedding" if stage == 0 else "") + (" + norm, head" if stage == len(stages) - 1 else "")
        cost = stages.costs[stage] / mean
        lines.append(f"  {stage:5d}  {stages.ranks[stage]:4d}  {cost:11.3f}  {numbers:8} {pattern}{ends}")
    return [*lines, f"  the slowest rank costs {stages.slowest_over_mean:.3f} x the mean"]


def _ranks(config: Config, layout: Layout) -> list[str]:
    training, stage = config.training, config.optimizer.zero_stage
    rows = training.global_batch_size // layout.dp
    shared = {0: "nothing", 1: "the optimizer", 2: "optimizer and gradients", 3: "optimizer, gradients and weights"}[
        stage
    ]
    micro = rows // training.micro_batch_size
    who = "rank r" if ranks_per_replica(config.parallel) == 1 else "data-parallel rank d"
    every = layout.dp
    over = layout.dp * layout.cp
    return [
        *(_grid(layout) if ranks_per_replica(config.parallel) > 1 else []),
        *(_token_shares(config) if layout.cp > 1 else []),
        f"  {who} reads rows {who[-1]}, {who[-1]} + {every}, ... of each global batch: {rows} rows, in {micro} micro-batches of {training.micro_batch_size}"
        if every > 1
        else f"  {'every' if layout.world_size > 1 else 'one'} rank reads all {rows} rows, in {micro} micro-batches of {training.micro_batch_size}",
        f"  ZeRO-{stage} divides {shared} over {over} {'dp x cp' if layout.cp > 1 else 'data-parallel'} rank{'s' if over > 1 else ''}",
    ]


def _grid(layout: Layout) -> list[str]:
    """Ranks by their coordinates: a line for each pp and dp, a column for each cp, in a cell those of tp."""
    ranks = layout.ranks()

    def cell(pp: int, dp: int, cp: int) -> str:
        first, last = ranks[pp, dp, cp, 0], ranks[pp, dp, cp, -1]
        return f"{first}-{last}" if last > first else f"{first}"

    columns, width = _some(layout.cp, 6), max(len(cell(-1, -1, -1)), 6)
    lines = ["  " + " " * 14 + "  ".join("..." if c is None else f"{f'cp {c}':<{width}}" for c in columns)]
    for pp in _some(layout.pp, 3):
        for dp in _some(layout.dp, 3) if pp is not None else [None]:
            if pp is None or dp is None:
                lines.append(f"    {'' if pp is None else '      '}...")
                continue
            shown = ("..." if c is None else f"{cell(pp, dp, c):<{width}}" for c in columns)
            lines.append(f"  {f'pp {pp}' if dp == 0 else '':<6} {f'dp {dp}':<6} " + "  ".join(shown))
    return [line.rstrip() for line in lines] if layout.cp > 1 else [line.rstrip() for line in lines[1:]]


def _token_shares(config: Config) -> list[str]:
    """Which tokens of a row each context-parallel rank holds."""
    parallel, length = config.parallel, config.data.sequence_length
    shares = []
    for rank in _some(parallel.cp, 3):
        if rank is None:
            shares.append("...")
            continue
        held = stretches(rank, parallel.cp, 1, length, parallel.cp_order).tolist()
        shares.append(f"cp {rank}: " + " and ".join(f"{start:,}-{stop - 1:,}" for start, stop in held))
    return [f"  tokens of a row ({parallel.cp_order}): " + ";  ".join(shares)]


def _memory_title(config: Config) -> str:
    rows, length = config.training.micro_batch_size, longest_sequence(config)
    where = "the CPU" if config.parallel.device == "cpu" else "a GPU"
    return f"memory of a rank, estimated for {where} (micro-batch of {rows} x {length:,} tokens, {config.training.precision})"


def _memory(
    config: Config, arch: Architecture, layout: Layout, stages: Stages, teacher: Architecture | None
) -> list[str]:
    found = memory_by_rank(arch, config, layout, stages, config.parallel.device == "cpu", teacher)
    memory = max(found, key=lambda of_rank: of_rank.total)
    rows = [(part.name, _bytes(part.bytes), part.note) for part in memory.parts]
    note = f"pipeline rank {found.index(memory)} of {layout.pp}, which needs most" if layout.pp > 1 else ""
    lines = _table([*rows, ("total", _bytes(memory.total), note)])
    if layout.pp > 1:
        totals = ("..." if rank is None else _bytes(found[rank].total) for rank in _some(layout.pp, 8))
        lines.append("  by pipeline rank: " + ", ".join(totals))
    if config.checkpoint.background:
        copied = max(saved_bytes(arch, config, layout.dp * layout.cp, stages, rank) for rank in range(layout.pp))
        lines.append(f"  host memory for saves beside training (checkpoint.background): {_bytes(copied)}")
    return lines


def _bytes_title(config: Config) -> str:
    rows, length = config.training.global_batch_size, config.data.sequence_length
    return f"bytes that the busiest rank receives in a step ({rows} rows x {length:,} tokens, each row one document)"


def _communication(config: Config, arch: Architecture, layout: Layout, stages: Stages) -> list[str]:
    length = config.data.sequence_length
    busiest = busiest_bytes(arch, config, layout, stages)
    notes = {
        "tp": "activations, gathered and summed",
        "pp": "hidden states and their gradients",
        "ends": "the tied weight's gradient",
        "data": "gradients and weights",
    }
    for name, window in (("cp local", arch.window_size), ("cp global", None)):
        if name in busiest:
            each = int(context_bytes(arch, config, window, None, length).max())
            notes[name] = f"keys, values and their gradients: {_bytes(each)} a layer and micro-batch"
    rows = [
        (name, _bytes(busiest[name]), notes[name])
        for name in ("cp local", "cp global", "tp", "pp", "ends", "data")
        if name in busiest
    ]
    return _table([*rows, ("total", _bytes(busiest.total()), "")]) if rows else ["  none"]


def _some(n: int, most: int) -> list[int | None]:
    """0 .. n - 1, or if these are more than ``most`` the first ones, None, and the last."""
    return [*range(n)] if n <= most else [*range(most - 1), None, n - 1]


def _flops_title(config: Config) -> str:
    rows, length = config.training.global_batch_size, config.data.sequence_length
    return f"FLOPs of a step ({rows} rows x {length:,} tokens, each row one document)"


def _flops(config: Config, arch: Architecture) -> list[str]:
    rows, row = config.training.global_batch_size, [config.data.sequence_length]
    forward, train = forward_flops(arch, row).times(rows), train_flops(arch, row).times(rows)
    full = full_attention_flops(arch, row).times(3 * rows)
    again = recompute_flops(arch, row, config.training.recompute) * rows
    uncut = uncut_flops(arch, row).times(3 * rows)
    table = [
        ("training", _flop(train.total), f"attention {train.attention_share:.1%}, head {train.head / train.total:.1%}"),
        ("forward", _flop(forward.total), ""),
        ("if all layers were global", _flop(full.total), f"{full.total / train.total:.2f} x"),
    ]
    if again:
        table.append(("computed again", _flop(again), f"recompute = {config.training.recompute}; not in MFU"))
    table.append(("without causal cut", _flop(uncut.total), "the other convention, for comparison; not in MFU"))
    return [f"  {CONVENTION}", *_table(table)]


def _tokens(config: Config) -> list[str]:
    step = config.training.global_batch_size * config.data.sequence_length
    note = "at the last batch size and length" if config.training.batch_ramp or config.data.sequence_schedule else ""
    return _table(
        [("a step", f"{step:,}", note), ("the run", f"{run_tokens(config):,}", f"{config.training.steps:,} steps")]
    )


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Names left, values right, notes after."""
    name, value = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {row[0]:<{name}}  {row[1]:>{value}}  {row[2]}".rstrip() for row in rows]


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.2f} KiB"


def _flop(count: int) -> str:
    for factor, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"
