"""Every recipe trains, as a tiny twin; and the figures in its head are the planner's."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {file.stem: file for file in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))}
ON_CPUS = {"debug", "quickstart", "adapt-smollm2-135m-12k", "tune-smollm2-135m-4k"}  # nothing to rent, so no plan
TWINS = sorted(set(FILES) - {"debug"})  # which is tiny itself
TASKS = ("pretrain-1b-", "pretrain-7b-", "adapt-llama2-7b-32k", "adapt-llama3-8b-128k", "adapt-llama3-8b-1m", "tune-")


def test_the_recipes_that_users_look_for_are_there() -> None:
    assert [task for task in TASKS if not any(name.startswith(task) for name in FILES)] == []


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all twins were trained, one after the other in one process."""
    folder = tmp_path_factory.mktemp("twins")
    command = [sys.executable, "-m", "tests.launching.twins", str(folder), *TWINS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_its_twin_trains(twins: Path, name: str) -> None:
    output = (twins / name / "output").read_text()
    assert (twins / name / "code").read_text() == "0", output
    records = [json.loads(line) for line in (twins / name / "run" / "metrics.jsonl").read_text().splitlines()]
    text = FILES[name].read_text()
    assert len(records) == 2 + text.count("sequence_length:") - 1, "a step for each phase, and two"
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    assert ("began from the weights of" in output) == ("load_part: weights" in text)
    assert len(list((twins / name / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize("name", sorted(set(FILES) - ON_CPUS))
def test_the_figures_in_its_head_are_the_planners(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = FILES[name].read_text()
    plans = re.findall(r"^# Plan: (.*)$", head, re.MULTILINE)
    assert len(plans) == 2, "the command, and what it says in short"
    command, figures = plans
    python, tool, *words = command.split()
    assert (python, tool, words[1]) == ("python", "tools/plan.py", f"launch/recipes/{name}.yaml")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [tool, *words])
    runpy.run_path(tool, run_name="__main__")
    assert capsys.readouterr().out.split("# in short\n")[1].strip() == figures


@pytest.mark.parametrize("name", sorted(set(FILES) - ON_CPUS))
def test_its_head_starts_it_on_as_many_gpus_as_are_planned(name: str) -> None:
    head = FILES[name].read_text()
    launch = re.search(r"^# ((?:bash|sbatch) .*)$", head, re.MULTILINE)
    assert launch is not None
    assert f"--config launch/recipes/{name}.yaml" in launch[1]
    count = re.search(r"--(nodes|nproc-per-node) (\d+)", launch[1])
    gpus = re.search(r"--gpus (\d+)", head)
    assert count is not None
    assert gpus is not None
    assert int(count[2]) * (8 if count[1] == "nodes" else 1) == int(gpus[1])
