"""What a dry run prints. No torch: it answers before torch could be imported."""

import itertools
from math import prod

from megatron_zebra.config.load import to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import stripes
from megatron_zebra.planning.flops import (
    CONVENTION,
    forward_flops,
    full_attention_flops,
    recompute_flops,
    train_flops,
    uncut_flops,
)
from megatron_zebra.planning.memory import training_memory
from megatron_zebra.planning.parameters import parameter_count


def dry_run_text(config: Config, arch: Architecture, world_size: int) -> str:
    """The resolved configuration and what it comes to: stripes, parameters, who does what, memory, FLOPs, tokens."""
    sections = [
        ("resolved configuration", to_yaml(config).rstrip().splitlines()),
        ("layers", stripes(arch.layer_kinds, arch.window_size).splitlines()),
        ("parameters", _parameters(arch)),
        (f"ranks: {world_size}", _ranks(config, world_size)),
        (_memory_title(config), _memory(config, arch, world_size)),
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


def longest_row(config: Config) -> int:
    """Tokens of the longest row of the run."""
    return max([config.data.sequence_length, *(phase.sequence_length for phase in config.data.sequence_schedule)])


def _value_at(step: int, phases: list[tuple[int, int]], afterwards: int) -> int:
    for steps, value in phases:
        if step < steps:
            return value
        step -= steps
    return afterwards


def _parameters(arch: Architecture) -> list[str]:
    shapes = arch.parameter_shapes()
    embedding = prod(shapes["embedding.weight"])
    head = prod(shapes.get("head.weight", (0,)))
    total = parameter_count(arch)
    return _table(
        [
            ("total", f"{total:,}", ""),
            ("embedding", f"{embedding:,}", "also the head's weight" if arch.tie_embeddings else ""),
            *([("head", f"{head:,}", "")] if head else []),
            ("non-embedding", f"{total - embedding - head:,}", f"{arch.num_layers} layers"),
        ]
    )


def _ranks(config: Config, world_size: int) -> list[str]:
    training, stage = config.training, config.optimizer.zero_stage
    rows = training.global_batch_size // world_size
    shared = {0: "nothing", 1: "the optimizer", 2: "optimizer and gradients", 3: "optimizer, gradients and weights"}[
        stage
    ]
    micro = rows // training.micro_batch_size
    return [
        f"  rank r reads rows r, r + {world_size}, ... of each global batch: {rows} rows, in {micro} micro-batches of {training.micro_batch_size}"
        if world_size > 1
        else f"  one rank reads all {rows} rows, in {micro} micro-batches of {training.micro_batch_size}",
        f"  ZeRO-{stage} divides {shared} over {world_size} data-parallel rank{'s' if world_size > 1 else ''}",
    ]


def _memory_title(config: Config) -> str:
    rows, length = config.training.micro_batch_size, longest_row(config)
    where = "the CPU" if config.parallel.device == "cpu" else "a GPU"
    return f"memory of a rank, estimated for {where} (micro-batch of {rows} x {length:,} tokens, {config.training.precision})"


def _memory(config: Config, arch: Architecture, world_size: int) -> list[str]:
    tokens = config.training.micro_batch_size * longest_row(config)
    on_cpu = config.parallel.device == "cpu"
    memory = training_memory(arch, config, world_size, tokens, on_cpu=on_cpu)
    rows = [(part.name, _bytes(part.bytes), part.note) for part in memory.parts]
    return _table([*rows, ("total", _bytes(memory.total), "")])


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
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _flop(count: int) -> str:
    for factor, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"
