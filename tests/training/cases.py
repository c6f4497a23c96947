"""A small model on ragged synthetic documents, for tests that compare ways to compute the same training."""

from typing import Any

from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.training.inputs import Inputs, open_inputs

BASE: dict[str, Any] = {
    "model.hidden_size": 32,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 101,
    "model.layer_group_size": 2,
    "model.window_size": 7,
    "data.sequence_length": 48,
    "data.synthetic.documents": 400,
    "data.synthetic.mean_length": 20,
    "training.steps": 10,
    "training.global_batch_size": 8,
    "training.precision": "fp32",
    "training.seed": 3,
    "training.loss_chunk_size": 20,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 2,
    "optimizer.clip_grad": 0.5,
}


def small(**overrides: Any) -> Config:
    """BASE with changes; ``__`` in a name stands for the dot."""
    return load_config(None, BASE | {name.replace("__", "."): value for name, value in overrides.items()})


def opened(config: Config) -> tuple[Architecture, Inputs]:
    """What train() needs beside the configuration."""
    inputs = open_inputs(config)
    return resolve(config.model, inputs.vocab_size, config.data.sequence_length), inputs
