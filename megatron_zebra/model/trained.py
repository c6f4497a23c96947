"""Which parameters are trained, by name. Pure; imports no torch."""

from megatron_zebra.config.sections import Training, WeightPart
from megatron_zebra.model.lora import ADAPTERS


def part_of(name: str) -> WeightPart:
    """The part of the model, as ``training.freeze`` names it, that parameter ``name`` belongs to."""
    module = name.split(".")[-2]
    if module == "embedding":
        return "embedding"
    if module == "head":
        return "head"
    if module.endswith("norm"):
        return "norms"
    return "attention" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def is_trained(name: str, training: Training) -> bool:
    """Whether parameter ``name`` has a gradient and optimizer state."""
    if not training.lora.rank:
        return part_of(name) not in training.freeze
    return name.endswith(ADAPTERS) or part_of(name) in training.lora.also_train
