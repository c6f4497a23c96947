"""How many parameters there are, and how many a rank holds. Pure: no torch."""

from dataclasses import replace
from math import prod

from megatron_zebra.config.sections import Config, Lora, Parallel, Training
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.lora import adapter_shapes
from megatron_zebra.model.trained import is_trained
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.planning.stages import Stages


def parameter_count(arch: Architecture) -> int:
    """All parameters, a tied weight once."""
    return sum(prod(shape) for shape in arch.parameter_shapes().values())


def trained_count(arch: Architecture, training: Training) -> int:
    """Parameters with a gradient, adapters among them."""
    shapes = arch.parameter_shapes() | adapter_shapes(arch, training.lora)
    return sum(prod(shape) for name, shape in shapes.items() if is_trained(name, training))


def held_parameters(
    arch: Architecture, parallel: Parallel, stages: Stages, pp_rank: int, training: Training | None = None
) -> tuple[int, int]:
    """Parameters of a rank, and how many of them are trained.

    It holds its stages' part over tensor parallelism, the vocabulary's padding included, and with the last stage a copy of
    a tied weight whose embedding is on another rank.

    Args:
        training: what is frozen and which adapters there are; None: neither.
    """
    training = training or Training()
    # All layers are alike: those of one are counted as often as there are.
    layers, one = len(stages.layers_of_rank(pp_rank)), replace(arch, layer_kinds=arch.layer_kinds[:1])
    sizes = [
        (prod(shape) * (layers if name.startswith("layers.") else 1), is_trained(name, training))
        for name, shape in _held(one, {0}, parallel, stages, pp_rank, training.lora)
    ]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def held_shapes(
    arch: Architecture, parallel: Parallel, stages: Stages, pp_rank: int, lora: Lora
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of those, as they are in memory (all tensor-parallel ranks have the same)."""
    return _held(arch, set(stages.layers_of_rank(pp_rank)), parallel, stages, pp_rank, lora)


def _held(
    arch: Architecture, layers: set[int], parallel: Parallel, stages: Stages, pp_rank: int, lora: Lora
) -> list[tuple[str, tuple[int, ...]]]:
    sharding = Sharding(parallel.tp, 0, arch.num_kv_heads, parallel.vocab_multiple)
    held = stages.of_rank(pp_rank)
    found = []
    for name, shape in (arch.parameter_shapes() | adapter_shapes(arch, lora)).items():
        part, *rest = name.split(".")
        if part == "layers":
            here = int(rest[0]) in layers
        else:
            here = (0 if part == "embedding" else len(stages) - 1) in held
        if here:
            found.append((name, sharding.box(name, shape).padded))
    if arch.tie_embeddings and len(stages) - 1 in held and 0 not in held:
        name = "embedding.weight"
        found.append((name, sharding.box(name, (arch.vocab_size, arch.hidden_size)).padded))
    return found


def heads_used(arch: Architecture, tp: int) -> tuple[int, int]:
    """Query and KV heads that a tensor-parallel rank computes; with more ranks than KV heads it has one of these."""
    return arch.num_heads // tp, max(1, arch.num_kv_heads // tp)


def weight_bytes(config: Config) -> int:
    """Bytes of a weight or an activation in ``training.precision``."""
    return 2 if config.training.precision == "bf16" else 4
