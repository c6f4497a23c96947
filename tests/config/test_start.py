"""What answers before torch could be imported does not import it, and is quick."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEBUG = ["--config", "launch/recipes/debug.yaml"]

TORCHLESS = """
import sys
import megatron_zebra.config.check, megatron_zebra.config.help, megatron_zebra.config.load
import megatron_zebra.model.architecture, megatron_zebra.model.pattern, megatron_zebra.attention.window
import megatron_zebra.planning.devices, megatron_zebra.planning.flops
import megatron_zebra.planning.memory, megatron_zebra.planning.summary
heavy = {"torch", "deepspeed", "transformers", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def run(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """pretrain_zebra.py without torchrun, and its seconds."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "pretrain_zebra.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done, time.perf_counter() - begun


def seconds_to_start() -> float:
    """Of an interpreter that does nothing: what this machine, loaded as it is, takes at least."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy, pydantic, yaml"], check=True)
    return time.perf_counter() - begun


def test_the_pure_modules_import_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", TORCHLESS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        ([*DEBUG, "--dry-run"], 0),
        ([*DEBUG, "--model.window_size", "0"], 2),
        ([*DEBUG, "--model.hidden_size", "66"], 2),
        ([*DEBUG, "--training.global_batch_size", "7", "--dry-run", "--world-size", "2"], 2),
        ([*DEBUG, "--data.synthetic.documents", "0", "--data.train", "nowhere/x"], 2),
        ([*DEBUG, "--data.synthetic.documents", "0", "--data.train", "x" * 5000], 2),
        ([*DEBUG, "--checkpoint.load", "x" * 5000], 2),
        ([*DEBUG, "--dry-run", "--world-size", "2", "--data.sequence_length", "333"], 0),
    ],
)
def test_it_answers_in_two_seconds(words: list[str], code: int) -> None:
    idle = seconds_to_start()
    done, seconds = run(*words)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert seconds < max(2.0, 4 * idle)


def test_the_dry_run_says_what_it_comes_to() -> None:
    done, _ = run(*DEBUG, "--dry-run", "--world-size", "4", "--training.recompute", "full")
    for part in (
        "hidden_size: 64",
        "█░█░",
        "180,800",
        "ranks: 4",
        "gradients",
        "if all layers were global",
        "computed again",
        "102,400",
    ):
        assert part in done.stdout
