"""Where a run begins: in the middle of what its folder holds, at another checkpoint, or at nothing."""

from dataclasses import replace
from pathlib import Path

from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.optimizer import ShardedOptimizer
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.inputs import Inputs
from megatron_zebra.training.schedule import rows_before
from megatron_zebra.training.state import Progress, resume_state, start_from


def start(
    config: Config,
    arch: Architecture,
    inputs: Inputs,
    folder: Path,
    optimizer: ShardedOptimizer,
    collective: WorldCollective,
) -> tuple[Progress, list[str]]:
    """Resume the run folder, or begin from ``checkpoint.load``, or from nothing."""
    progress, notes = resume_state(folder / "checkpoints", config, arch, optimizer, collective)
    if progress is not None:
        notes.append(f"resumed {folder} at step {progress.step}")
    elif config.checkpoint.load is not None:
        progress = start_from(Path(config.checkpoint.load), config, arch, optimizer, collective)
        notes.append(f"began from {config.checkpoint.load} ({config.checkpoint.load_part}) at step {progress.step}")
    fresh = Progress(seed=config.training.seed, data=inputs.fingerprint())
    if progress is None or progress.step == 0:
        return fresh, notes
    if (progress.data, progress.seed) != (fresh.data, fresh.seed):
        if config.data.sequence_schedule:
            raise UserError(
                "data.sequence_schedule: the training data or training.seed is another than before, so its phases would not fit step "
                f"{progress.step}; begin a new run (checkpoint.load, checkpoint.load_part: weights), or leave the schedule out"
            )
        notes.append("the training data or training.seed is another than before: its rows are read from the first one")
        return replace(progress, consumed_rows=0, data=fresh.data, seed=fresh.seed), notes
    expected = rows_before(config, progress.step)
    if config.data.sequence_schedule and expected != progress.consumed_rows:
        raise UserError(
            f"data.sequence_schedule: step {progress.step} had consumed {progress.consumed_rows} rows, with this configuration it would be "
            f"{expected}; keep the global batch of the steps already done"
        )
    return progress, notes
