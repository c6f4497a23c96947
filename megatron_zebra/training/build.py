"""From a configuration to a model and its optimizer on this rank."""

import torch

from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.optimizer import Adam, ShardedOptimizer
from megatron_zebra.parallel.replicated import ReplicatedOptimizer
from megatron_zebra.parallel.zero import ZeroOptimizer, deepspeed_settings
from megatron_zebra.planning.memory import parameter_count, reduce_bucket_size


def build_model(config: Config, arch: Architecture, device: torch.device) -> Decoder:
    """The decoder with its initial weights, in the precision trained in."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    init = Initializer(config.training.seed, config.model.init_std, arch.num_layers, dtype, device)
    try:
        return Decoder(
            arch,
            init,
            backend=config.model.attention_backend,
            recompute=config.training.recompute,
            loss_chunk_size=config.training.loss_chunk_size,
        )
    except ValueError as error:
        raise UserError(f"model.attention_backend = {config.model.attention_backend}: {error}") from None


def build_optimizer(config: Config, arch: Architecture, model: Decoder) -> ShardedOptimizer:
    """Wrap ``model`` in the optimizer of ``optimizer.zero_stage``."""
    settings = config.optimizer
    adam = Adam(settings.beta1, settings.beta2, settings.eps, settings.weight_decay, settings.clip_grad)
    if settings.zero_stage == 0:
        return ReplicatedOptimizer(model, adam)
    deepspeed = deepspeed_settings(
        settings.zero_stage,
        config.training.precision == "bf16",
        config.training.micro_batch_size,
        settings.clip_grad,
        reduce_bucket_size(parameter_count(arch)),
        config.deepspeed,
    )
    return ZeroOptimizer(model, adam, deepspeed)
