"""What a launcher script is called with: options of the launcher, then ``--config FILE`` and the training's overrides."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pretrain_zebra
from megatron_zebra.config import load
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.training.run_folder import run_folder

WORKER = "megatron_zebra.launching.worker"
TRAINING = "pretrain_zebra"


@dataclass(frozen=True)
class Training:
    """The words after ``--config``, and what they say."""

    words: list[str]
    config: Config
    folder: Path


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``words`` as options of the launcher and words for pretrain_zebra.py, which begin with ``--config``."""
    begin = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--config"), len(words))
    return list(words[:begin]), list(words[begin:])


def rehearsed(words: list[str], world_sizes: Sequence[int]) -> Training:
    """Dry-run ``words`` on each number of processes. No process is started and torch is not imported.

    Where ``words`` ask for no more than that, or for help, it is shown (of the last number) and this process ends: the run
    would not come to its last step, and whoever starts it again on that (AGAIN) would do so for ever.

    Raises:
        UserError: what the dry run says, or that there are no words.
    """
    if not words:
        raise UserError(
            "--config FILE is missing; options of the launcher stand before it, --section.key VALUE after it"
        )
    try:
        line = load.parse_words(words)
    except UserError as error:
        raise UserError(str(error), mine=True) from None
    if line.dry_run and line.world_size:
        world_sizes = [line.world_size]
    out = err = io.StringIO()
    for size in world_sizes:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pretrain_zebra.main([*words, "--dry-run", "--world-size", str(size)])
        if code:
            raise UserError(err.getvalue().strip().removeprefix("error: "), mine=True)
    if line.help or line.dry_run:
        print(err.getvalue(), end="", file=sys.stderr)
        print(out.getvalue(), end="", flush=True)
        sys.exit(0)
    config = load.load_config(line.config, line.overrides)
    return Training(words, config, run_folder(config, line.config))
