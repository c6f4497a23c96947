"""What a step number decides: the learning rate, the global batch, the sequence length. Pure; counts optimizer steps."""

import math

from megatron_zebra.config.sections import Config, Optimizer


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of a schedule of ``steps``.

    The warm-up rises linearly and reaches the peak at step ``warmup_steps``; its first step is not at zero.
    """
    peak, floor, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return peak
    if optimizer.schedule == "wsd":
        tail = optimizer.decay_steps or max(1, steps // 10)
        done = (step - max(steps - tail, warmup)) / tail
    else:
        done = (step - warmup) / max(1, (optimizer.decay_steps or steps) - warmup)
    done = min(max(done, 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if optimizer.schedule == "cosine" else 1 - done
    return floor + (peak - floor) * left


def global_batch_size(config: Config, step: int) -> int:
    """Rows of step ``step``."""
    for phase in config.training.batch_ramp:
        if step < phase.steps:
            return phase.global_batch_size
        step -= phase.steps
    return config.training.global_batch_size


def rows_before(config: Config, step: int) -> int:
    """Rows consumed by the steps before ``step``."""
    rows = 0
    for phase in config.training.batch_ramp:
        taken = min(step, phase.steps)
        rows, step = rows + taken * phase.global_batch_size, step - taken
    return rows + step * config.training.global_batch_size


def row_order(config: Config) -> list[str]:
    """What numbers the rows of a run beside its data and its seed, a line each."""
    lengths = [f"{length} for {rows} rows" if rows else str(length) for rows, length in sequence_phases(config)]
    weights = [source.weight for source in config.data.train]
    return [
        f"sequence lengths {', then '.join(lengths)}",
        f"data.packing {config.data.packing}",
        f"weights of data.train {', '.join(f'{weight / sum(weights):.6g}' for weight in weights)}",
    ]


def sequence_phases(config: Config) -> list[tuple[int | None, int]]:
    """(rows, sequence length) of each phase of the sequence-length schedule; rows of the last is None: no end."""
    phases: list[tuple[int | None, int]] = []
    step = 0
    for phase in config.data.sequence_schedule:
        rows = rows_before(config, step + phase.steps) - rows_before(config, step)
        phases.append((rows, phase.sequence_length))
        step += phase.steps
    return [*phases, (None, config.data.sequence_length)]
