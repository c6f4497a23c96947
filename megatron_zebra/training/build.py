"""From a configuration to what trains on this rank: the model or its stages, the optimizer, and how both are run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.trained import is_trained
from megatron_zebra.parallel.context.shard import ContextParallel
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group
from megatron_zebra.parallel.optimizer import Adam, ShardedOptimizer
from megatron_zebra.parallel.replicated import ReplicatedOptimizer
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.parallel.zero import ZeroOptimizer, deepspeed_settings
from megatron_zebra.pipeline.runner import Runner, WholeModel
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.pipeline.stages import Pipeline
from megatron_zebra.planning.memory import reduce_bucket_size
from megatron_zebra.training.teacher import Teacher


@dataclass(frozen=True)
class Trained:
    """What this rank trains, and how. ``decoder``: all layers in one; None where stages divide them."""

    optimizer: ShardedOptimizer
    runner: Runner
    context: ContextParallel
    decoder: Decoder | None


def build_training(config: Config, arch: Architecture, grid: Grid) -> Trained:
    """Model, optimizer and runner of this rank; called by all ranks together."""
    parallel = config.parallel
    # Where attention is computed again in backward, it keeps nothing and fetches anew by itself; host memory keeps all.
    training = config.training
    keep_fetched = parallel.cp_keep_fetched or training.recompute != "none" or training.offload_activations
    context = ContextParallel(grid.cp, parallel.cp_order, parallel.cp_head_groups, keep_fetched)
    if grid.pp.size == 1:
        decoder = build_model(config, arch, grid.device, grid.tp)
        optimizer = build_optimizer(config, decoder, grid)
        teacher = Teacher(config, grid, _dtype(config)) if config.training.distill.teacher else None
        return Trained(optimizer, WholeModel(optimizer.forward, optimizer.backward, teacher), context, decoder)
    stages = stages_of(config, arch)
    held: dict[int, Decoder] = {}
    for number in (i for i, rank in enumerate(stages.ranks) if rank == grid.pp.rank):
        first = held[0].embedding if 0 in held else None
        tied = first.weight if first is not None and arch.tie_embeddings else None
        held[number] = build_model(config, arch, grid.device, grid.tp, stages.layers[number], tied)
    if arch.tie_embeddings and stages.ranks[0] != stages.ranks[-1]:
        ends = [part.embedding or part.head for part in held.values()]
        for end in filter(None, ends):
            weight: Any = end.weight
            weight.tied_over_stages = True  # its gradient is summed over the two ranks that hold it
    optimizer = build_optimizer(config, nn.ModuleList(held.values()), grid)
    runner = Pipeline(
        held, len(stages.layers), parallel.pp_schedule, grid, arch.hidden_size, _dtype(config), optimizer.collect
    )
    return Trained(optimizer, runner, context, None)


def build_model(
    config: Config,
    arch: Architecture,
    device: torch.device,
    tp: Group | None = None,
    layers: range | None = None,
    tied: nn.Parameter | None = None,
) -> Decoder:
    """The decoder with its initial weights, in the precision trained in: this rank's part of ``layers`` (None: all)."""
    tp = tp or Group.alone("tp")
    sharding = Sharding(tp.size, tp.rank, arch.num_kv_heads, config.parallel.vocab_multiple)
    init = Initializer(
        config.training.seed,
        config.model.init_std,
        arch.num_layers,
        _dtype(config),
        device,
        tp,
        sharding,
        trained=lambda name: is_trained(name, config.training),
        lora=config.training.lora,
        blank=config.checkpoint.load is not None,
    )
    try:
        return Decoder(
            arch,
            init,
            layers=layers,
            backend=config.model.attention_backend,
            recompute=config.training.recompute,
            offload=config.training.offload_activations,
            loss_chunk_size=config.training.loss_chunk_size,
            split_backward=config.parallel.pp_schedule == "zero_bubble",
            tied=tied,
        )
    except ValueError as error:
        raise UserError(f"model.attention_backend = {config.model.attention_backend}: {error}") from None


def build_optimizer(config: Config, module: nn.Module, grid: Grid) -> ShardedOptimizer:
    """Wrap what this rank holds in the optimizer of ``optimizer.zero_stage``."""
    settings = config.optimizer
    adam = Adam(settings.beta1, settings.beta2, settings.eps, settings.weight_decay, settings.clip_grad)
    if settings.zero_stage == 0:
        return ReplicatedOptimizer(module, adam, grid)
    deepspeed = deepspeed_settings(
        settings.zero_stage,
        config.training.precision == "bf16",
        config.training.micro_batch_size,
        settings.clip_grad,
        reduce_bucket_size(sum(param.numel() for param in module.parameters() if param.requires_grad)),
        settings.offload,
        config.deepspeed,
    )
    return ZeroOptimizer(module, adam, deepspeed, grid)


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32
