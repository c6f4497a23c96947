#!/usr/bin/env python
"""Train a Zebra: ``torchrun --nproc-per-node N pretrain_zebra.py --config FILE [--section.key VALUE ...]``."""

import os
import sys

from megatron_zebra.config import check, help, load
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError, naming_files, tell
from megatron_zebra.launched import launched


def main(words: list[str]) -> int:
    """Returns the exit code: 0, 2 for a user's mistake, or 1 where another rank was lost (torchrun turns any failure into 1)."""
    try:
        line = load.parse_words(words)
        if line.help:
            print(help.help_text())
            return 0
        if line.world_size and not line.dry_run:
            raise UserError(
                "--world-size counts only with --dry-run; processes are started by torchrun --nproc-per-node"
            )
        started = launched()
        world_size = line.world_size if line.dry_run and line.world_size else started.world_size
        config = load.load_config(line.config, line.overrides)
        if config.checkpoint.load is not None:
            from megatron_zebra.training.adopt import adopted
            from megatron_zebra.training.run_folder import run_folder

            with naming_files():
                config = adopted(config, run_folder(config, line.config))
        if wrong := check.problems(config, world_size):
            raise UserError("\nerror: ".join(wrong))
        _run(config, line, world_size, started.rank)
    except UserError as error:
        tell(error)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(config: Config, line: load.CommandLine, world_size: int, rank: int) -> None:
    from megatron_zebra.config.derived import longest_sequence
    from megatron_zebra.model.architecture import resolve
    from megatron_zebra.training.inputs import open_inputs
    from megatron_zebra.training.run_folder import locked, run_folder
    from megatron_zebra.training.tasks import rehearse

    # Before torch, which a task may load: a broken connection is told in one line, not in C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = run_folder(config, line.config)
    teacher, differs = None, []
    with naming_files():
        if config.checkpoint.load is not None or config.training.distill.teacher is not None:
            from megatron_zebra.training.adopt import notes, teacher_of

            teacher, differs = teacher_of(config), notes(config, folder)
        inputs = open_inputs(config)
    arch = resolve(config.model, inputs.vocab_size, longest_sequence(config))
    with naming_files():
        rehearse(inputs.tasks, arch.vocab_size)
    if rank == 0:
        for warning in check.warnings(config):
            print(f"warning: {warning}", file=sys.stderr)
    if config.checkpoint.mirror is not None:
        from megatron_zebra.checkpoint.mirror import Mirror

        Mirror(config.checkpoint.mirror).apart_from(folder / "checkpoints")
    if line.dry_run:
        from megatron_zebra.pipeline.split import stages_of
        from megatron_zebra.planning.summary import dry_run_text

        print(dry_run_text(config, arch, world_size, stages_of(config, arch), differs, teacher))
        return
    # torch and DeepSpeed only from here on: they take seconds to import.
    import contextlib

    from megatron_zebra.parallel.agreement import facts
    from megatron_zebra.parallel.process import world
    from megatron_zebra.parallel.watch import Pace
    from megatron_zebra.training.loop import train

    with locked(folder) if rank == 0 else contextlib.nullcontext():
        parallel, same = config.parallel, facts(config.model_dump() | {"fingerprint of the data": inputs.fingerprint()})
        with world(
            parallel.device,
            parallel.timeout,
            tp=parallel.tp,
            cp=parallel.cp,
            pp=parallel.pp,
            same=same,
            pace=Pace(still=parallel.hang_report),
        ) as grid:
            train(config, arch, inputs, folder, grid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
