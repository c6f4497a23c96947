"""Where a run begins: in the middle of what its folder holds, at another checkpoint, or at nothing."""

from dataclasses import replace
from pathlib import Path

from megatron_zebra.checkpoint import catalog
from megatron_zebra.checkpoint.errors import CheckpointError
from megatron_zebra.checkpoint.mirror import Mirror
from megatron_zebra.config.sections import Config
from megatron_zebra.convert.kept import keep, keep_tokenizer
from megatron_zebra.convert.source import CheckpointSource, open_model
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.optimizer import ShardedOptimizer
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.adopt import goes_on
from megatron_zebra.training.adopt import notes as described
from megatron_zebra.training.inputs import Inputs
from megatron_zebra.training.schedule import rows_before
from megatron_zebra.training.state import Progress, restore, restore_weights, resume_state


def start(
    config: Config,
    arch: Architecture,
    inputs: Inputs,
    folder: Path,
    optimizer: ShardedOptimizer,
    collective: WorldCollective,
) -> tuple[Progress, list[str]]:
    """Resume the run folder, or begin from ``checkpoint.load``, or from nothing."""
    root = folder / "checkpoints"
    fetched = _fetched(config.checkpoint.mirror, root, collective)
    progress, notes = resume_state(root, config, arch, optimizer, collective)
    notes = [*fetched, *notes]
    if progress is not None:
        notes.append(f"resumed {folder} at step {progress.step}")
    elif config.checkpoint.load is not None:
        progress, more = _begin(config, arch, folder, optimizer, collective)
        notes += more
    if config.data.tokenizer is not None and collective.rank == 0:
        keep_tokenizer(Path(config.data.tokenizer), folder)  # after what checkpoint.load brings
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


def _fetched(mirror: str | None, root: Path, collective: WorldCollective) -> list[str]:
    """Bring a newer checkpoint from the second home, if there is one; a line about that.

    Raises:
        UserError: that home cannot be read and there is no checkpoint here: the run might begin anew though it has one.
    """
    if mirror is None:
        return []
    try:
        name = Mirror(mirror).fetch_newest(root, collective)
    except CheckpointError as error:
        if collective.all_gather(catalog.newest(root))[0] is None:
            raise
        return [f"warning: {error}; goes on from what is here"]
    return [f"fetched {name} from {mirror}"] if name is not None else []


def _begin(
    config: Config, arch: Architecture, folder: Path, optimizer: ShardedOptimizer, collective: WorldCollective
) -> tuple[Progress, list[str]]:
    """Begin from ``checkpoint.load``: all of a checkpoint of a run, or the weights of any model."""
    settings = config.checkpoint
    source = open_model(Path(settings.load or ""), collective)
    if collective.rank == 0:
        keep(source.folder, folder)  # for an export, which may come when the source is gone
    if goes_on(config) and isinstance(source, CheckpointSource):
        progress = restore(source.checkpoint, config, arch, optimizer)
        if settings.schedule == "restart":
            progress = replace(progress, schedule_start=progress.step)
        return progress, [f"began from {source.folder} at step {progress.step}"]
    restore_weights(source, arch, optimizer)
    return Progress(), [*source.notes, f"began from the weights of {source.folder}", *described(config, folder)]
