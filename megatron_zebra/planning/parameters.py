"""How many parameters there are, and how many a rank holds. Pure: no torch."""

from math import prod

from megatron_zebra.config.sections import Config, Parallel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.planning.stages import Stages


def parameter_count(arch: Architecture) -> int:
    """All parameters, a tied weight once."""
    return sum(prod(shape) for shape in arch.parameter_shapes().values())


def held_parameters(arch: Architecture, parallel: Parallel, stages: Stages, pp_rank: int) -> int:
    """Parameters of a rank: its stages' part over tensor parallelism, the vocabulary's padding included.

    With the last stage comes a copy of a tied weight whose embedding is on another rank.
    """
    return sum(prod(shape) for shape in held_shapes(arch, parallel, stages, pp_rank))


def held_shapes(arch: Architecture, parallel: Parallel, stages: Stages, pp_rank: int) -> list[tuple[int, ...]]:
    """Shapes of those, as they are in memory (all tensor-parallel ranks have the same)."""
    sharding = Sharding(parallel.tp, 0, arch.num_kv_heads, parallel.vocab_multiple)
    held = stages.of_rank(pp_rank)
    layers = set(stages.layers_of_rank(pp_rank))
    found = []
    for name, shape in arch.parameter_shapes().items():
        part, *rest = name.split(".")
        if part == "layers":
            here = int(rest[0]) in layers
        else:
            here = (0 if part == "embedding" else len(stages) - 1) in held
        if here:
            found.append(sharding.box(name, shape).padded)
    if arch.tie_embeddings and len(stages) - 1 in held and 0 not in held:
        found.append(sharding.box("embedding.weight", (arch.vocab_size, arch.hidden_size)).padded)
    return found


def heads_used(arch: Architecture, tp: int) -> tuple[int, int]:
    """Query and KV heads that a tensor-parallel rank computes; with more ranks than KV heads it has one of these."""
    return arch.num_heads // tp, max(1, arch.num_kv_heads // tp)


def weight_bytes(config: Config) -> int:
    """Bytes of a weight or an activation in ``training.precision``."""
    return 2 if config.training.precision == "bf16" else 4
