"""Where a run begins: in the middle of what its folder holds, at another checkpoint, or at nothing."""

from dataclasses import replace
from pathlib import Path

from megatron_zebra.checkpoint.errors import CheckpointError
from megatron_zebra.checkpoint.mirror import Mirror
from megatron_zebra.checkpoint.verify import Found, find_latest_good
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
from megatron_zebra.training.schedule import row_order, rows_before
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
    found, notes = _newest(config.checkpoint.mirror, root, collective)
    progress = resume_state(root, found, config, arch, optimizer, collective)
    if progress is not None:
        notes.append(f"resumed {folder} at step {progress.step}")
    elif config.checkpoint.load is not None:
        progress, more = _begin(config, arch, folder, optimizer, collective)
        notes += more
    if config.data.tokenizer is not None and collective.rank == 0:
        keep_tokenizer(Path(config.data.tokenizer), folder)  # after what checkpoint.load brings
    fresh = Progress(seed=config.training.seed, data=inputs.fingerprint(), order=row_order(config))
    if progress is None or progress.step == 0:
        return fresh, notes
    if (progress.data, progress.seed) != (fresh.data, fresh.seed):
        if config.data.sequence_schedule:
            raise UserError(
                "data.sequence_schedule: the training data or training.seed is another than before, so its phases would not fit step "
                f"{progress.step}; begin a new run (checkpoint.load, checkpoint.load_part: weights), or leave the schedule out"
            )
        notes.append("the training data or training.seed is another than before: its rows are read from the first one")
        return replace(progress, consumed_rows=0, data=fresh.data, seed=fresh.seed, order=fresh.order), notes
    expected = rows_before(config, progress.step)
    if config.data.sequence_schedule and expected != progress.consumed_rows:
        raise UserError(
            f"data.sequence_schedule: step {progress.step} had consumed {progress.consumed_rows} rows, with this configuration it would be "
            f"{expected}; keep the global batch of the steps already done"
        )
    if progress.order != fresh.order:
        notes += [
            f"{now} (before: {before}): training rows have another order now, so that some are read again and others left out"
            for before, now in zip(progress.order, fresh.order)  # none where an older checkpoint does not tell
            if before != now
        ]
    return replace(progress, order=fresh.order), notes


def _newest(mirror: str | None, root: Path, collective: WorldCollective) -> tuple[Found, list[str]]:
    """The newest good checkpoint, brought from the second home where that has one after the newest good one here; and lines
    about what was passed over and fetched.

    Raises:
        UserError: nothing good is here and that home cannot be read: the run might begin anew though it has a checkpoint.
    """
    found = find_latest_good(root, collective)
    if mirror is None:
        return found, found.skipped
    notes, failure = [*found.skipped], None
    try:
        away = Mirror(mirror)
        names = away.newer(-1 if found.step is None else found.step, collective)
    except CheckpointError as error:
        names, failure = [], error
    for name in names:
        try:
            folder = away.fetch(name, root, collective)
        except CheckpointError as error:
            notes.append(f"warning: {error}")
            failure = error
            continue
        notes.append(f"fetched {name} from {mirror}")
        found = find_latest_good(root, collective)
        notes += found.skipped
        if found.folder == folder:
            return found, list(dict.fromkeys(notes))
    if failure is not None:
        if found.folder is None:
            raise failure
        notes.append(f"warning: {failure}; goes on from what is here")
    return found, list(dict.fromkeys(notes))


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
