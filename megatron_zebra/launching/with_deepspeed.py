"""A run by DeepSpeed's launcher, started from one node: ``python -m megatron_zebra.launching.with_deepspeed [OPTION ...] --config FILE [...]``.

Options that are not listed here go to ``deepspeed`` as they are; the nodes are those of its hostfile.
"""

import argparse
import functools
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_zebra.errors import UserError, run_tool
from megatron_zebra.launching.command import TRAINING, WORKER, rehearsed, split
from megatron_zebra.launching.supervise import FAILED, MISTAKE, at_last_step, ranks_with, supervise

RETRY = set(range(1, 256)) - {MISTAKE}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "launch/deepspeed/train.sh",
        usage="bash launch/deepspeed/train.sh [OPTION ...] --config FILE [--section.key VALUE ...]",
        epilog="Every other option before --config goes to deepspeed as it is: --hostfile FILE, --num_gpus N, --include HOSTS, ...",
        allow_abbrev=False,
    )
    top.add_argument("--max-restarts", type=int, default=0, metavar="N", help="starts after a failure (default: 0)")
    top.add_argument("--no-check", action="store_true", help="leave out the check of the nodes")
    return top


def main() -> None:
    words, training_words = split(sys.argv[1:])
    options, others = parser().parse_known_args(words)
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts}: must be 0 or more")
    nodes = chosen_nodes(others)
    training = rehearsed(training_words, [nodes.processes])
    try:
        logs = training.folder / "logs" / "deepspeed"
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"logging.run_dir = {training.folder}: cannot be written ({error.strerror})") from None
    if nodes.pdsh:
        _check_paths()
    spelt = shell_word if nodes.pdsh else str
    command = [
        *(sys.executable, "-m", "megatron_zebra.launching.runner", "--no_local_rank", "--log_level", "warning"),
        *("--enable_each_rank_log", spelt(str(logs.absolute()))),
        *(*others, "--module", TRAINING if options.no_check else WORKER, *map(spelt, training.words)),
    ]
    print(f"the processes write to {logs}/TIME_rankN.log", flush=True)
    began = time.time()
    finished = functools.partial(at_last_step, training.config, training.folder)
    code = supervise(
        lambda: command, options.max_restarts, RETRY, finished, ranks_of=lambda _: ranks_with(training.words)
    )
    if code in (FAILED, MISTAKE):
        for line in told_errors(logs, began):
            print(line, file=sys.stderr)
    sys.exit(code)


def told_errors(logs: Path, since: float) -> list[str]:
    """Each error that processes wrote to files of ``logs`` after ``since``, once."""
    texts = [file.read_text(errors="replace") for file in sorted(logs.iterdir()) if file.stat().st_mtime >= since]
    return list(dict.fromkeys(line for text in texts for line in text.splitlines() if line.startswith("error: ")))


@dataclass(frozen=True)
class Nodes:
    """What ``deepspeed`` will start: how many ``processes``; ``pdsh``: through a shell on each node, by way of pdsh."""

    processes: int
    pdsh: bool


def chosen_nodes(words: list[str]) -> Nodes:
    """Those that ``deepspeed`` takes with these options.

    Raises:
        UserError: there are none such. DeepSpeed itself takes this node alone where it finds no hostfile, and as many as
            there are where more are asked for.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidiactl") else "cpu")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner
    from deepspeed.utils import logger

    logger.setLevel(logging.CRITICAL)
    options = runner.parse_args([*words, TRAINING])
    if options.hostfile != runner.DLTS_HOSTFILE and not os.path.isfile(options.hostfile):
        raise UserError(f"--hostfile {options.hostfile}: must be a file (launch/deepspeed/hostfile.example is one)")
    try:
        pool = runner.fetch_hostfile(options.hostfile) or {"localhost": get_accelerator().device_count()}
        chosen = runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
    except ValueError as error:
        raise UserError(f"deepspeed: {error}") from None
    if options.num_nodes > len(chosen):
        raise UserError(f"--num_nodes {options.num_nodes}: must be at most the {len(chosen)} of --hostfile")
    chosen = runner.apply_num_nodes_and_gpus(chosen, options.num_nodes, options.num_gpus)
    processes = sum(len(slots) for slots in chosen.values())
    if not processes:
        raise UserError("deepspeed: there is no GPU to use (--hostfile, --include, --exclude, --num_gpus)")
    several = (options.force_multi or len(chosen) > 1) and not options.no_ssh
    return Nodes(processes, several and options.launcher.lower() == runner.PDSH_LAUNCHER)


def shell_word(word: str) -> str:
    """``word`` so that bash on the nodes reads it as it is.

    DeepSpeed joins all words with blanks for pdsh. It puts a word with a blank into double quotes, so there must be none;
    and pdsh replaces what follows a percent sign.
    """
    if re.fullmatch(r"[\w@+=:,./-]+", word, re.ASCII):
        return word
    return "$'" + "".join(f"\\x{byte:02x}" for byte in word.encode()) + "'"


def _check_paths() -> None:
    """Those that DeepSpeed puts into the words of a shell as they are."""
    for path in (os.getcwd(), sys.executable):
        if shell_word(path) != path:
            raise UserError(
                f"{path}: DeepSpeed's launcher for several nodes cannot handle this path (allowed: letters, digits, . _ - / @ + = : ,); "
                "or use launch/torchrun.sh on each"
            )


if __name__ == "__main__":
    run_tool(main)
