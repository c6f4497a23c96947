"""What follows from the keys: the nulls of a model, and numbers that several keys decide together. Pure."""

from math import lcm

from megatron_zebra.config.sections import Config, Model, Parallel


def kv_heads(model: Model) -> int:
    """Key and value heads."""
    return model.num_kv_heads or model.num_heads


def head_dim(model: Model) -> int:
    """Width of a head."""
    return model.head_dim or model.hidden_size // model.num_heads


def ffn_width(model: Model) -> int:
    """Width of the MLP: SwiGLU has three matrices, so 8/3 of hidden_size is as large as two of 4 hidden_size."""
    return model.ffn_hidden_size or (model.hidden_size * 8 // 3 + 63) // 64 * 64


def longest_sequence(config: Config) -> int:
    """The longest row of the run, in tokens."""
    return max([config.data.sequence_length, *(phase.sequence_length for phase in config.data.sequence_schedule)])


def sequence_multiple(parallel: Parallel) -> int:
    """Every sequence length must be a multiple of this: equal chunks over cp, each rank's tokens equal over tp."""
    zigzag = parallel.cp > 1 and parallel.cp_order == "zigzag"
    return lcm(2 * parallel.cp if zigzag else parallel.cp, parallel.cp * parallel.tp)


def ranks_per_replica(parallel: Parallel) -> int:
    """Ranks that hold the model once; the world divided by this is dp."""
    return parallel.tp * parallel.cp * parallel.pp


def stages_per_rank(parallel: Parallel) -> int:
    """Pipeline stages that each rank holds; without a pipeline one."""
    if parallel.pp == 1:
        return 1
    return parallel.pp_stages_per_rank or (1 if parallel.pp_schedule == "1f1b" else 2)
