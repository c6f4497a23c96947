"""Every layout of a model on some GPUs: which fit, in order of their predicted speed, and why the others do not. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_zebra.config.check import divisors, problems
from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.sections import MOST_CP, Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import layer_kinds
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.memory import Memory, memory_by_rank
from megatron_zebra.planning.stages import Stages
from megatron_zebra.planning.step_time import Machine, StepTime, step_time

RECOMPUTE = ("none", "attention", "full")


@dataclass(frozen=True)
class Plan:
    """One way to train: the configuration and what it comes to on the fullest rank."""

    config: Config
    layout: Layout
    stages: Stages
    memory: Memory
    time: StepTime

    @property
    def name(self) -> str:
        """What a user would write."""
        return f"{self.layout}  ZeRO-{self.config.optimizer.zero_stage}  recompute {self.config.training.recompute}"


def plan(arch: Architecture, config: Config, gpus: int, machine: Machine) -> Plan:
    """``config`` as it is, on ``gpus``."""
    parallel = config.parallel
    layout = Layout.of(gpus, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    stages = stages_of(config, arch)
    memory = max(memory_by_rank(arch, config, layout, stages), key=lambda of_rank: of_rank.total)
    return Plan(config, layout, stages, memory, step_time(arch, config, layout, stages, machine))


def search(
    arch: Architecture, config: Config, gpus: int, machine: Machine
) -> tuple[list[Plan], dict[str, list[Config]]]:
    """Plans that fit, fastest first; and the configurations that do not, by reason.

    Varied: tp (within a node), cp, pp, the ZeRO stage and recomputation. Of one layout's ways that fit only the fastest is
    kept. All else stays as ``config`` has it.
    """
    best: dict[Layout, Plan] = {}
    refused: dict[str, list[Config]] = {}
    for candidate in candidates(config, gpus, machine.node):
        if broken := problems(candidate, gpus):
            refused.setdefault(broken[0], []).append(candidate)
            continue
        found = _fitting(arch, candidate, gpus, machine)
        if found is None:
            reason = f"more memory than a GPU's {machine.device.memory_bytes / 2**30:.0f} GiB, with any recomputation and ZeRO stage"
            refused.setdefault(reason, []).append(candidate)
        else:
            best[found.layout] = found
    return sorted(best.values(), key=lambda found: found.time.total), refused


def candidates(config: Config, gpus: int, node: int) -> Iterator[Config]:
    """One for each division of ``gpus`` into tp x cp x pp x dp."""
    sizes = divisors(gpus)
    within, contexts, pipelines = (
        [size for size in sizes if size <= most] for most in (node, MOST_CP, config.model.num_layers)
    )
    for tp, cp, pp in product(within, contexts, pipelines):
        if gpus % (tp * cp * pp) == 0:
            parallel = config.parallel.model_copy(
                update={"tp": tp, "cp": cp, "pp": pp, "pp_layers": None} | _stages_of_one_rank(config, pp)
            )
            optimizer = config.optimizer.model_copy(update={"zero_stage": 1})
            yield config.model_copy(update={"parallel": parallel, "optimizer": optimizer})


def _stages_of_one_rank(config: Config, pp: int) -> dict[str, object]:
    """Schedules of several stages a rank have no meaning without a pipeline."""
    return {} if pp > 1 else {"pp_schedule": "1f1b", "pp_stages_per_rank": None}


def _fitting(arch: Architecture, config: Config, gpus: int, machine: Machine) -> Plan | None:
    """The fastest ZeRO stage and recomputation that fit, of those that training accepts."""
    parallel = config.parallel
    layout = Layout.of(gpus, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    fitting = []
    for recompute in RECOMPUTE:
        again = config.model_copy(update={"training": config.training.model_copy(update={"recompute": recompute})})
        stages = stages_of(again, arch)  # balanced for what is computed again too
        for zero in (1, 2, 3):
            tried = again.model_copy(update={"optimizer": config.optimizer.model_copy(update={"zero_stage": zero})})
            if problems(tried, gpus):
                continue
            memory = max(memory_by_rank(arch, tried, layout, stages), key=lambda of_rank: of_rank.total)
            if memory.total <= machine.device.memory_bytes:
                time = step_time(arch, tried, layout, stages, machine)
                fitting.append(Plan(tried, layout, stages, memory, time))
    return min(fitting, key=lambda found: found.time.total, default=None)


def at_lengths(
    arch: Architecture, config: Config, gpus: int, machine: Machine, lengths: list[int]
) -> tuple[dict[int, tuple[Plan, Plan]], dict[int, str]]:
    """By sequence length: ``config``, and the same with every layer global, as many tokens a step as ``config`` has; and
    why there is none of the other lengths."""
    full = replace(arch, layer_kinds=layer_kinds(arch.num_layers, 1))
    tokens = config.training.global_batch_size * longest_sequence(config)
    found, refused = {}, {}
    for length in lengths:
        rows = max(1, tokens // length)
        changed = config.model_copy(
            update={
                "data": config.data.model_copy(update={"sequence_length": length, "sequence_schedule": []}),
                "training": config.training.model_copy(update={"global_batch_size": rows, "batch_ramp": []}),
            }
        )
        if broken := problems(changed, gpus):
            refused[length] = broken[0]
        else:
            found[length] = (plan(arch, changed, gpus, machine), plan(full, changed, gpus, machine))
    return found, refused
