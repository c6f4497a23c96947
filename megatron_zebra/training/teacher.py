"""The teacher of a distillation: a frozen model of its own architecture, on the ranks and tokens of the one that learns."""

from pathlib import Path

import torch

from megatron_zebra.config.sections import Config
from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import open_model
from megatron_zebra.data.batch import LocalBatch
from megatron_zebra.model.distill import Guide
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import WorldCollective


class Teacher:
    """Divided over tp as the model is, whole on every rank of ``grid.data`` whatever ZeRO divides."""

    def __init__(self, config: Config, grid: Grid, dtype: torch.dtype) -> None:
        """Opens ``training.distill.teacher``; called by all ranks together."""
        self.settings = config.training.distill
        source = open_model(Path(self.settings.teacher or ""), WorldCollective(grid))
        self.model = load_decoder(
            source,
            grid.device,
            dtype,
            tp=grid.tp,
            vocab_multiple=config.parallel.vocab_multiple,
            backend=config.model.attention_backend,
        )

    def __call__(self, batch: LocalBatch) -> Guide:
        """What it predicts for a micro-batch."""
        return self.model.guide(
            batch.tokens, batch.positions, batch.segments, self.settings.weight, self.settings.temperature
        )
