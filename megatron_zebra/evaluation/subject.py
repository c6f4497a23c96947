"""The model that a task judges, on this rank."""

from dataclasses import dataclass

from megatron_zebra.config.derived import sequence_multiple
from megatron_zebra.config.sections import Parallel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.context.shard import ContextParallel
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.pipeline.runner import Runner


@dataclass(frozen=True)
class Subject:
    """``runner`` computes losses under any layout; ``decoder`` is the whole stack of layers (of a tensor-parallel rank: its
    part), None where ranks divide the stack."""

    arch: Architecture
    grid: Grid
    runner: Runner
    context: ContextParallel
    decoder: Decoder | None

    @property
    def length_multiple(self) -> int:
        """Rows have a multiple of so many tokens."""
        return sequence_multiple(Parallel(tp=self.grid.tp.size, cp=self.grid.cp.size, cp_order=self.context.order))
