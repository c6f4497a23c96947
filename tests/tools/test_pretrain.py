"""pretrain_zebra.py as its users run it: bad input is one line and exit code 2, and leaves nothing behind."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import pretrain_zebra
from megatron_zebra.config.load import load_config
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.model.architecture import resolve
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.training import loop
from megatron_zebra.training.inputs import open_inputs

DEBUG = "launch/recipes/debug.yaml"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command line is answered with."""
    assert pretrain_zebra.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err.strip()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--model.hiden_size 64", ["model.hiden_size", "no such key", "model.hidden_size"]),
        ("--training.steps 0", ["training.steps = 0", ">= 1"]),
        ("--optimizer.zero_stage 4", ["optimizer.zero_stage = 4", "0, 1, 2, 3"]),
        ("--model.hidden_size 66", ["model.hidden_size = 66", "model.num_heads = 4"]),
        ("--model.window_size 0", ["model.window_size = 0", ">= 1"]),
        ("--training.global_batch_size 9 --world-size 2 --dry-run", ["training.global_batch_size = 9", "multiple"]),
        ("--world-size 2", ["--world-size counts only with --dry-run"]),
        ("--world-size 64 --dry-run", ["training.global_batch_size = 8", "at most 8 processes", "not 64"]),
        ("--training.precision fp8", ["training.precision = 'fp8'", "fp32, bf16"]),
        ("--data.sequence_length", ["--data.sequence_length", "has no value"]),
        ("training.steps 3", ["training.steps", "not an option"]),
        ("--config no.yaml", ["no.yaml", "cannot be read"]),
        ("--model.attention_backend flash", ["model.attention_backend = flash"]),
        ("--checkpoint.load nowhere", ["checkpoint.load = nowhere", "holds no model"]),
        (
            '--evaluation.tasks [{"task":"retrieval","interval":9,"options":{"text":"none.txt","tokenizer":"none"}}] --dry-run',
            ["evaluation.tasks[0].options: none: "],
        ),
        ("--data.synthetic.documents 0", ["data.train = []", "at least one"]),
    ],
)
def test_a_bad_value_is_one_line(
    words: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    line = refused(["--config", DEBUG, "--logging.run_dir", str(run_dir), *words.split()], capsys)
    for part in parts:
        assert part in line
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (run_dir / "metrics.jsonl").exists()
    assert not (run_dir / "checkpoints").exists()


def write_pair(prefix: Path, largest: int = 99) -> None:
    with PairWriter(prefix, Vocabulary(100, 0, "ab" * 32, "sentencepiece", "test.model")) as writer:
        for _ in range(5):
            writer.add(np.array([1, 2, largest, 0], np.uint16), [4])
        writer.finish()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + data + whole[offset + len(data) :])


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (lambda p: p.with_suffix(".bin").unlink(), ["p.bin"]),
        (lambda p: p.with_suffix(".idx").unlink(), ["p.idx"]),
        (lambda p: cut(p.with_suffix(".bin"), 13), ["p.bin"]),
        (lambda p: cut(p.with_suffix(".idx"), 60), ["p.idx"]),
        (lambda p: overwrite(p.with_suffix(".idx"), 0, b"NOTMAGIC"), ["p.idx", "begins with", "MMIDIDX"]),
        (lambda p: overwrite(p.with_suffix(".idx"), 9, b"\x07"), ["p.idx", "version"]),
        (lambda p: p.with_suffix(".json").write_text("{"), ["p.json"]),
    ],
)
def test_a_damaged_pair_is_one_line(
    harm: Any, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path / "p")
    harm(tmp_path / "p")
    words = ["--config", DEBUG, "--data.synthetic.documents", "0", "--data.train", str(tmp_path / "p")]
    line = refused([*words, "--logging.run_dir", str(tmp_path / "run")], capsys)
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit_the_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "p")
    words = ["--config", DEBUG, "--data.synthetic.documents", "0", "--data.train", str(tmp_path / "p")]
    line = refused([*words, "--model.vocab_size", "64"], capsys)
    assert "holds id 99" in line
    assert "model.vocab_size is 64" in line
    line = refused([*words, "--data.tokenizer", str(tmp_path / "no.model")], capsys)
    assert "no.model" in line
    overwrite(tmp_path / "p.json", 0, b"?")
    assert "p.json" in refused(words, capsys)


def test_an_empty_share_of_the_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PairWriter(tmp_path / "p", Vocabulary(100, 0, "ab" * 32, "sentencepiece", "test.model")) as writer:
        writer.add(np.array([1, 0], np.uint16), [2])
        writer.finish()
    words = ["--config", DEBUG, "--data.synthetic.documents", "0", "--data.train", str(tmp_path / "p")]
    line = refused([*words, "--data.split", "[0.1, 0.9, 0]"], capsys)
    assert "documents 0 to 0 of 1 hold no token: an empty data set" in line


def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused(["--config", DEBUG, "--logging.run_dir", str(tmp_path)], capsys)
    assert f"logging.run_dir = {tmp_path}: another run is writing there" in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refused(["--config", DEBUG, "--logging.run_dir", str(tmp_path / "file" / "run")], capsys)
    assert "cannot be written" in line


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (environment | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        line = refused(["--config", DEBUG, "--logging.run_dir", str(tmp_path / "run")], capsys)
    assert "the port is in use; give another MASTER_PORT" in line


def test_under_torchrun_rank_0_alone_tells_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", DEBUG, "--model.window_size", "0"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert pretrain_zebra.main(words) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--config", DEBUG, "--dry-run", "--model.window_size", "0"], 2)],
)
def test_answers_come_before_torch_is_imported(words: list[str], code: int) -> None:
    """Processor time, since the machine may be busy; under two seconds."""
    before = os.times()
    script = f"import sys, pretrain_zebra; code = pretrain_zebra.main({words!r}); print('torch' in sys.modules); sys.exit(code)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    after = os.times()
    assert result.returncode == code
    assert result.stdout.endswith("False\n")
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert "Traceback" not in result.stderr


def debug_run(grid: Grid, run_dir: Path, overrides: dict[str, Any]) -> None:
    config = load_config(DEBUG, overrides)
    inputs = open_inputs(config)
    arch = resolve(config.model, inputs.vocab_size, config.data.sequence_length)
    with patch.object(loop, "write_plots"):
        loop.train(config, arch, inputs, run_dir, grid)


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def test_debug_yaml_by_torchrun_is_stopped_by_sigterm_and_goes_on(run_distributed: Any, tmp_path: Path) -> None:
    """One worker gets the signal; all save, torchrun ends with 0, and the rest of the run is as if nothing had happened."""
    overrides = {"training.steps": 30, "evaluation.interval": 0, "data.sequence_length": 64}
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run_dir = tmp_path / "stopped"
    command = [*launcher, "pretrain_zebra.py", "--config", DEBUG, "--logging.run_dir", str(run_dir), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_line(run_dir / "metrics.jsonl", 200)
            os.kill(worker(process.pid), signal.SIGTERM)
            _, err = process.communicate(timeout=100)
        except BaseException:
            process.terminate()
            raise
    assert process.returncode == 0, err
    stopped = losses(run_dir)
    assert 1 <= len(stopped) < 30
    assert f"stopped by a signal after step {len(stopped)}; the same command resumes from there" in err
    assert err.count(f"step {len(stopped)}/30") == 1  # one rank prints
    files = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "environment.json", "logs", "metrics.jsonl", "checkpoints"} <= files
    run_distributed(debug_run, 2, run_dir, overrides)
    run_distributed(debug_run, 2, tmp_path / "whole", overrides)
    assert losses(run_dir) == losses(tmp_path / "whole")


def test_ctrl_c_saves_and_ends_a_process_of_its_own_within_a_profile(tmp_path: Path) -> None:
    settings = {
        "training.steps": 100_000,
        "evaluation.interval": 0,
        "data.sequence_length": 64,
        "training.profile_steps": "[1, 100000]",
        "logging.run_dir": tmp_path,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "pretrain_zebra.py", "--config", DEBUG, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_line(tmp_path / "metrics.jsonl", 200)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=100)
        except BaseException:
            process.kill()
            raise
    done = len(losses(tmp_path))
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert f"stopped by a signal after step {done}; the same command resumes from there" in err
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
    assert (tmp_path / "profile" / f"steps-1-{done}-rank-00000.json.gz").stat().st_size


def wait_for_line(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_bytes().count(b"\n")):
        assert time.monotonic() < end, f"no line in {path}"
        time.sleep(0.02)


def worker(launcher: int) -> int:
    """The process id of one of torchrun's workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(
        int(pid) for pid in reversed(children) if "pretrain_zebra.py" in Path(f"/proc/{pid}/cmdline").read_text()
    )
