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

from megatron_zebra.errors import UserError
from megatron_zebra.launching import with_deepspeed, with_torchrun
from megatron_zebra.launching.with_deepspeed import Nodes

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
    assert f"stopped by a signal after step {stopped}" in log.read_text()

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
        (
            TORCHRUN,
            ["--rdzv-endpoint", "a:70000", *DEBUG],
            "--rdzv-endpoint a:70000: must be HOST or HOST:PORT, a port",
        ),
        (TORCHRUN, ["--rdzv-endpoint", "a:0", *DEBUG], "--rdzv-endpoint a:0: must be HOST or HOST:PORT, a port from 1"),
        (TORCHRUN, ["--nproc_per_node", "3", *DEBUG], "training.global_batch_size = 8: must be a multiple of"),
        (TORCHRUN, ["--nnodes=2", "--rdzv_endpoint=a_b:0", *DEBUG], "--rdzv-endpoint a_b:0: must be HOST or HOST:PORT"),
        (TORCHRUN, ["--max_restarts=-1", *DEBUG], "--nproc-per-node must be 1 or more, --max-restarts 0 or more"),
        (
            TORCHRUN,
            ["--log_dir", "/proc/x", *DEBUG],
            "--log-dir /proc/x: cannot be written (No such file or directory)",
        ),
        (TORCHRUN, ["--nproc-per-node", "2"], "--config FILE is missing"),
        (
            TORCHRUN,
            ["--nproc-per-node", "3", *DEBUG, "--dry-run"],
            "training.global_batch_size = 8: must be a multiple",
        ),
        (TORCHRUN, [*DEBUG, "--dry-run=1"], "'--dry-run=1' is not an option"),
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


@pytest.mark.parametrize(
    ("script", "words", "begins", "holds"),
    [
        (TORCHRUN, ["--nproc-per-node", "2", *DEBUG, "--dry-run"], "# resolved configuration", "# ranks: 2 = "),
        (TORCHRUN, ["--nnodes=1:2", "--rdzv-endpoint=a", "--nproc-per-node=2", *DEBUG, "--dry-run"], "# r", "# ranks: 4 = "),
        (TORCHRUN, [*DEBUG, "--dry-run", "--world-size", "8"], "# resolved configuration", "# ranks: 8 = "),
        (TORCHRUN, [*DEBUG, "--help"], "usage: ", "training.global_batch_size"),
        (DEEPSPEED, ["--num_gpus", "2", *DEBUG, "--dry-run"], "# resolved configuration", "# ranks: 2 = "),
    ],
)  # fmt: skip
def test_a_dry_run_or_help_is_shown_and_nothing_starts(
    tmp_path: Path, script: str, words: Sequence[str], begins: str, holds: str
) -> None:
    """Not 75, on which a cluster would start it again for ever."""
    job = start(tmp_path, script, *words, "--logging.run_dir", str(tmp_path / "run"))
    assert job.wait(60) == 0, (tmp_path / "err").read_text()
    out = (tmp_path / "out").read_text()
    assert out.startswith(begins)
    assert out.count(holds) == 1
    assert not (tmp_path / "run").exists()


def test_only_names_of_options_are_spelt_with_dashes() -> None:
    words = ["--rdzv_id", "my_run", "--rdzv_conf=a_b=c_d", "-t", "--no_check", "--nnodes", "2"]
    spelt = ["--rdzv-id", "my_run", "--rdzv-conf=a_b=c_d", "-t", "--no-check", "--nnodes", "2"]
    assert with_torchrun.dashed(words) == spelt


def test_deepspeed_counts_the_slots_of_its_hostfile(tmp_path: Path) -> None:
    hostfile = str(ROOT / "launch/deepspeed/hostfile.example")
    chosen = with_deepspeed.chosen_nodes
    assert chosen(["--hostfile", hostfile]) == Nodes(16, pdsh=True)
    assert chosen(["--hostfile", hostfile, "--include", "node-2:0,1,2"]) == Nodes(3, pdsh=False)
    assert chosen(["--hostfile", hostfile, "--num_nodes", "1", "--num_gpus", "4"]) == Nodes(4, pdsh=False)
    assert chosen(["--hostfile", hostfile, "--launcher", "openmpi"]) == Nodes(16, pdsh=False)


@pytest.mark.parametrize(
    ("hosts", "words", "error"),
    [
        (None, [], "--hostfile {file}: must be a file"),
        ("a slots=2\nb slots=2", ["--num_nodes", "3"], "--num_nodes 3: must be at most the 2 of --hostfile"),
        ("a slots=0", [], "deepspeed: there is no GPU to use"),
        ("a 2", [], "deepspeed: Hostfile contains a bad entry: a 2"),
        ("a slots=2\na slots=2", [], "deepspeed: Hostfile contains multiple entries for a"),
        ("", [], "deepspeed: Hostfile is empty"),
        ("a slots=2", ["--include", "b"], "deepspeed: Hostname 'b' not found in hostfile"),
    ],
)
def test_a_mistake_in_the_hostfile_is_one_line(
    tmp_path: Path, hosts: str | None, words: list[str], error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hostfile"
    if hosts is not None:
        file.write_text(hosts)
    with pytest.raises(UserError, match=f"^{re.escape(error.format(file=file))}"):
        with_deepspeed.chosen_nodes(["--hostfile", str(file), *words])
    assert capfd.readouterr() == ("", "")


def by_deepspeed(folder: Path, ssh: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The launcher over two nodes: a fake pdsh runs the first one's words in a shell here, as ssh does; ``%n`` is its number."""
    pdsh = 'while [ "$1" != -w ]; do shift; done; shift 2; command="$*"; exec bash -c "${command//%n/0}"'
    for name, text in (("pdsh", pdsh), ("ssh", ssh)):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRINTING, "--hostfile", str(folder / "hostfile"), "--max-restarts", "2", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_words_reach_the_nodes_of_deepspeed_as_they_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "it's a {run,dir} of 100%n $HOME"
    words = [*DEBUG, "--logging.run_dir", str(run_dir), "--data.valid=[{prefix: 'no \"such\" file',name: é}]"]
    done = by_deepspeed(tmp_path, "echo 127.0.0.1", "--no-check", *words)
    logs = list(run_dir.glob("logs/deepspeed/*_rank0.log"))
    assert [log.read_text() for log in logs] == [f"{words}\n"], done.stdout + done.stderr


def test_a_node_that_deepspeed_cannot_reach_is_one_line_and_not_tried_again(tmp_path: Path) -> None:
    done = by_deepspeed(tmp_path, "exit 255", *DEBUG, "--logging.run_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: deepspeed: Using hostfile at ")
    assert "host=node-a was not reachable via ssh" in line


# The launcher as it is, without its dry run and with a module in the training's place that prints its words.
PRINTING = """
import sys
from megatron_zebra.launching import command, with_deepspeed
from megatron_zebra.config import load
from pathlib import Path
def rehearsed(words, sizes):
    line = load.parse_words(words)
    return command.Training(words, load.load_config(line.config, line.overrides), Path(line.overrides["logging.run_dir"]))
with_deepspeed.rehearsed, with_deepspeed.TRAINING = rehearsed, "tests.launching.printing"
with_deepspeed.main()
"""


def test_errors_of_deepspeeds_processes_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "old_rank0.log").write_text("error: of yesterday\n")
    os.utime(tmp_path / "old_rank0.log", (0, 0))
    (tmp_path / "new_rank0.log").write_text("step 1\nerror: the disk is full\n")
    (tmp_path / "new_rank1.log").write_text("error: the disk is full\nerror: another\n")
    assert with_deepspeed.told_errors(tmp_path, time.time() - 60) == ["error: the disk is full", "error: another"]
