"""What tools/plan.py prints."""

import re
from collections.abc import Mapping, Sequence

from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import stripes
from megatron_zebra.planning.parameters import parameter_count
from megatron_zebra.planning.search import Plan
from megatron_zebra.planning.step_time import Machine

GIB = 2**30


def heading(arch: Architecture, config: Config, gpus: int, machine: Machine) -> str:
    """The model and the machine."""
    length, rows = config.data.sequence_length, config.training.global_batch_size
    teacher = config.training.distill.teacher
    return "\n".join(
        [
            stripes(arch.layer_kinds, arch.window_size),
            f"  {parameter_count(arch) / 1e9:,.2f} billion parameters; a step is {rows} rows x {length:,} = {rows * length:,} tokens",
            f"  {gpus} x {machine.device.name} ({machine.device.memory_bytes / GIB:.0f} GiB, {machine.device.peak_flops / 1e12:.0f} TFLOP/s), "
            f"{machine.node} a node, {machine.network * 8 / 1e9:.0f} Gbit/s each between nodes",
            *(
                [f"  the teacher {teacher} is left out, in memory and time (--dry-run reads it, and counts its memory)"]
                if teacher
                else []
            ),
        ]
    )


def ranked(plans: Sequence[Plan], fitting: int, tokens: float) -> str:
    """Plans in the order given, one a line."""
    if not plans:
        return "\n# no layout fits"
    lines = [
        f"\n# layouts that fit, fastest first ({len(plans)} of {fitting})",
        f"  {'tp':>3} {'cp':>4} {'pp':>4} {'dp':>5}  ZeRO  {'recompute':10}{'GiB':>7}{'step s':>9}{'tokens/s':>11}{'MFU':>7}{'exchange':>10}{'bubble':>8}{'days':>8}",
    ]
    for plan in plans:
        time, layout = plan.time, plan.layout
        lines.append(
            f"  {layout.tp:>3} {layout.cp:>4} {layout.pp:>4} {layout.dp:>5}  {plan.config.optimizer.zero_stage:>4}  "
            f"{plan.config.training.recompute:10}{plan.memory.total / GIB:>7.1f}{time.total:>9.2f}{time.tokens_per_second:>11,.0f}"
            f"{time.mfu:>7.1%}{_exchange(plan) / time.total:>10.1%}{time.parts['bubble'] / time.total:>8.1%}{time.days(tokens):>8.2f}"
        )
    return "\n".join(lines)


def refusals(refused: Mapping[str, Sequence[Config]]) -> str:
    """Why the other layouts are not among them: each rule once, with the commonest case of it."""
    if not refused:
        return ""
    rules: dict[str, list[tuple[int, str]]] = {}
    for reason, configs in refused.items():
        rules.setdefault(re.sub(r"\d+", "n", reason), []).append((len(configs), reason))
    lines = ["\n# the others"]
    for cases in sorted(rules.values(), key=lambda cases: -sum(count for count, _ in cases)):
        lines.append(f"  {sum(count for count, _ in cases):>4}  {'such as ' if len(cases) > 1 else ''}{max(cases)[1]}")
    return "\n".join(lines)


def details(plan: Plan, arch: Architecture, tokens: float) -> str:
    """Memory of the fullest rank and the step's time, part by part."""
    time = plan.time
    memory = [(part.name, f"{part.bytes / GIB:,.2f} GiB", part.note) for part in plan.memory.parts]
    seconds = [(name, f"{value:,.3f} s", f"{value / time.total:.1%}") for name, value in time.parts.items() if value]
    width = max(len(name) for name, _, _ in [*memory, *seconds])
    lines = [f"\n# {plan.name}: memory of the fullest rank"]
    lines += [f"  {name:{width}}  {value:>12}  {note}" for name, value, note in memory]
    lines += [f"  {'total':{width}}  {plan.memory.total / GIB:>8,.2f} GiB", "\n# seconds of a step, as predicted"]
    lines += [f"  {name:{width}}  {value:>12}  {note}" for name, value, note in seconds]
    lines.append(
        f"  {'total':{width}}  {time.total:>10,.3f} s  {time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}, "
        f"{time.days(tokens):,.2f} days for {tokens:,.0f} tokens"
    )
    if plan.layout.pp > 1:
        held = ", ".join(str(len(layers)) for layers in plan.stages.layers)
        lines.append(
            f"  stages of {held} layers; the slowest rank costs {plan.stages.slowest_over_mean:.3f} x the mean"
        )
    return "\n".join(lines)


def in_short(plan: Plan, tokens: float) -> str:
    """The plan in one line, as the heads of launch/recipes have it."""
    time = plan.time
    days = time.days(tokens)
    took = f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours"
    return (
        f"{plan.memory.total / GIB:.1f} GiB on the fullest GPU; a step {time.total:.1f} s, {time.tokens_per_second:,.0f} tokens/s, "
        f"MFU {time.mfu:.0%}; {took} for {tokens / 1e9:.1f} G tokens"
    )


def too_much(plan: Plan, machine: Machine) -> str:
    """That the fullest rank needs more than a GPU has, in one line; nothing where it fits."""
    needed, held = plan.memory.total, machine.device.memory_bytes
    if needed <= held:
        return ""
    return f"  does not fit: {needed / GIB:,.2f} GiB of {held / GIB:.0f} GiB a GPU (--search shows which layouts do)"


def by_length(found: Mapping[int, tuple[Plan, Plan]], refused: Mapping[int, str]) -> str:
    """Zebra beside full attention; of the lengths that cannot be planned why not."""
    lines = [
        "\n# Zebra beside full attention, as many tokens a step",
        f"  {'length':>9}{'Zebra tok/s':>13}{'full tok/s':>12}{'faster':>8}{'Zebra GiB':>11}{'full GiB':>10}{'Zebra MFU':>11}{'full MFU':>10}",
    ]
    for length, (zebra, full) in found.items():
        fast, slow = zebra.time.tokens_per_second, full.time.tokens_per_second
        lines.append(
            f"  {length:>9,}{fast:>13,.0f}{slow:>12,.0f}{fast / slow:>7.2f}x{zebra.memory.total / GIB:>11.1f}"
            f"{full.memory.total / GIB:>10.1f}{zebra.time.mfu:>11.1%}{full.time.mfu:>10.1%}"
        )
    lines += [f"  {length:>9,}  {reason}" for length, reason in refused.items()]
    return "\n".join(lines)


def _exchange(plan: Plan) -> float:
    computing = ("matrix", "attention", "elementwise", "optimizer", "bubble")
    return sum(seconds for name, seconds in plan.time.parts.items() if name not in computing)
