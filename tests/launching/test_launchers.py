"""launch/torchrun.sh and launch/deepspeed/train.sh as users call them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_zebra.launching import with_deepspeed

ROOT = Path(__file__).parents[2]
TORCHRUN, DEEPSPEED = "launch/torchrun.sh", "launch/deepspeed/train.sh"
DEBUG = ["--config", "launch/recipes/debug.yaml", "--evaluation.interval", "0"]


def start(folder: Path, script: str, *words: str) -> subprocess.Popen[bytes]:
    """The python that runs the tests is the one that the script finds."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(
            ["bash", script, *words], cwd=ROOT, env=os.environ | {"PATH": path}, stdout=out, stderr=err
        )


def records(run_dir: Path) -> list[dict[str, float]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
def test_stopped_under_torchrun_and_ended_under_deepspeed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [
        *DEBUG,
        "--training.steps",
        "100000",
        "--optimizer.schedule",
        "constant",
        "--logging.run_dir",
        str(run_dir),
    ]
    job = start(tmp_path, TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", *words)
    until = time.monotonic() + 240
    while len(records(run_dir)) < 3:
        assert job.poll() is None, (tmp_path / "err").read_text()[-2000:]
        assert time.monotonic() < until, (tmp_path / "err").read_text()[-2000:]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75, (tmp_path / "err").read_text()[-2000:]
    assert "[rank 0] nodes: " in (tmp_path / "out").read_text()
    stopped = len(records(run_dir))
    (log,) = run_dir.glob("logs/node-*/*/attempt_0/0/stderr.log")
    assert f"stopped by SIGTERM after step {stopped}" in log.read_text()

    words[words.index("100000")] = str(stopped + 2)
    job = start(tmp_path, DEEPSPEED, "--num_gpus", "2", "--max-restarts", "1", *words)
    assert job.wait(240) == 0, (tmp_path / "err").read_text()[-2000:]
    assert [record["step"] for record in records(run_dir)] == list(range(1, stopped + 3))
    logs = sorted(run_dir.glob("logs/deepspeed/*.log"))
    assert [re.sub(r"\d+_", "", log.name) for log in logs] == ["rank0.log", "rank1.log"]


@pytest.mark.parametrize(
    ("script", "words", "error"),
    [
        (TORCHRUN, ["--nproc-per-node", "2", *DEBUG, "--model.window_size", "0"], "model.window_size = 0: must be"),
        (TORCHRUN, ["--nproc-per-node", "3", *DEBUG], "training.global_batch_size = 8: must be a multiple of"),
        (TORCHRUN, ["--nnodes", "2", *DEBUG], "--rdzv-endpoint HOST[:PORT]: must name one of the 2 nodes"),
        (TORCHRUN, ["--nnodes", "two", *DEBUG], "--nnodes two: must be a whole number from 1, or MIN:MAX"),
        (TORCHRUN, ["--nproc-per-node", "2"], "--config FILE is missing"),
        (DEEPSPEED, ["--num_gpus", "3", *DEBUG], "training.global_batch_size = 8: must be a multiple of"),
    ],
)
def test_a_mistake_is_one_line_and_no_process(tmp_path: Path, script: str, words: Sequence[str], error: str) -> None:
    run_dir = tmp_path / "run"
    more = ["--logging.run_dir", str(run_dir)] if "--config" in words else []
    job = start(tmp_path, script, *words, *more)
    assert job.wait(60) == 2
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert line.startswith(f"error: {error}")
    assert not run_dir.exists()


def test_deepspeed_counts_the_slots_of_its_hostfile(tmp_path: Path) -> None:
    hostfile = str(ROOT / "launch/deepspeed/hostfile.example")
    assert with_deepspeed.world_size(["--hostfile", hostfile]) == 16
    assert with_deepspeed.world_size(["--hostfile", hostfile, "--include", "node-2:0,1,2"]) == 3
    assert with_deepspeed.world_size(["--hostfile", hostfile, "--num_nodes", "1", "--num_gpus", "4"]) == 4


def test_errors_of_deepspeeds_processes_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "old_rank0.log").write_text("error: of yesterday\n")
    os.utime(tmp_path / "old_rank0.log", (0, 0))
    (tmp_path / "new_rank0.log").write_text("step 1\nerror: the disk is full\n")
    (tmp_path / "new_rank1.log").write_text("error: the disk is full\nerror: another\n")
    assert with_deepspeed.told_errors(tmp_path, time.time() - 60) == ["error: the disk is full", "error: another"]
