"""tools/plan.py as a user runs it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "launch/recipes/pretrain-70b-128k.yaml"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("recipe", "gpus"), [("launch/recipes/adapt-llama3-8b-1m.yaml", "64"), (RECIPE, "512")], ids=["8B 1M", "70B 128k"]
)
def test_a_search_prints_a_ranked_table_in_seconds(recipe: str, gpus: str) -> None:
    began = time.monotonic()
    done = run("--config", recipe, "--gpus", gpus, "--gpu", "h100", "--search", "--tokens", "1e9")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # 2 to 5 on an idle machine
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "layouts that fit" in line)
    table = [line.split() for line in lines[start + 2 : lines.index("", start + 1)]]
    assert len(table) > 5
    seconds = [float(row[7]) for row in table]
    assert seconds == sorted(seconds)
    assert all(int(tp) * int(cp) * int(pp) * int(dp) == int(gpus) for tp, cp, pp, dp, *_ in table)
    assert "# the others" in lines


SMALL_RECIPE = "launch/recipes/pretrain-7b-32k.yaml"


@pytest.mark.parametrize(
    ("gpu", "told"),
    [("4090", ["  does not fit: 73.24 GiB of 23 GiB a GPU (--search shows which layouts do)"]), ("h100", [])],
)
def test_a_layout_that_does_not_fit_is_told(gpu: str, told: list[str]) -> None:
    done = run("--config", SMALL_RECIPE, "--gpus", "8", "--gpu", gpu, "--parallel.tp", "1")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "does not fit" in line] == told


def test_a_search_in_which_nothing_fits_fails() -> None:
    done = run("--config", SMALL_RECIPE, "--gpus", "4", "--gpu", "4090", "--search")
    assert done.returncode == 1
    assert "# no layout fits" in done.stdout
    assert "more memory than a GPU's 23 GiB, with any recomputation and ZeRO stage" in done.stdout
    assert "# in short" not in done.stdout
    assert not done.stderr


def test_a_layout_by_length_and_its_picture(tmp_path: Path) -> None:
    words = ["--config", RECIPE, "--gpus", "512", "--gpu", "H200", "--lengths", "32768", "131072"]
    done = run(*words, "--training.recompute", "none", "--output", str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr
    assert "pp 4 x dp 4 x cp 4 x tp 8  ZeRO-1  recompute none" in done.stdout
    assert "131,072" in done.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_length_that_cannot_be_planned_has_its_reason(tmp_path: Path) -> None:
    words = ["--config", SMALL_RECIPE, "--gpus", "64", "--gpu", "h100", "--output", str(tmp_path / "plan.svg")]
    done = run(*words, "--lengths", "30000")
    assert done.returncode == 0, done.stderr
    assert "     30,000  training.global_batch_size = 139: must be a multiple of" in done.stdout
    assert done.stdout.splitlines()[-1] == "no picture: none of these lengths can be planned"
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_said() -> None:
    words = ["--config", "launch/recipes/adapt-llama3-8b-1m.yaml", "--gpus", "64", "--gpu", "h100"]
    assert "the teacher" not in run(*words).stdout
    assert "  the teacher big is left out" in run(*words, "--training.distill.teacher", "big").stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "512", "--gpu", "h1000"], "--gpu h1000: is not known (allowed: gb300, "),
        (["--gpus", "0", "--gpu", "h100"], "--gpus 0: must be above 0"),
        (["--gpus", "1000000000000", "--gpu", "h100", "--search"], "--gpus 1000000000000: must be at most "),
        (["--gpus", "512", "--gpu", "h100", "--tokens", "-1"], "--tokens -1.0: must be above 0"),
        (["--gpus", "512", "--gpu", "h100", "--network", "nan"], "--network nan: must be above 0"),
        (["--gpus", "100", "--gpu", "h100"], "parallel.tp x cp x pp = 8 x 4 x 4 = 128: must divide the 100 processes"),
        (["--gpus", "512", "--gpu", "h100", "--parallel.tpp", "2"], "parallel.tpp: "),
        (["--gpus", "512", "--gpu", "h100", "--model.vocab_size", "null"], "model.vocab_size = null: must be given"),
        (["--gpus", "512", "--gpu", "h100", "--output", "x.png"], "--output: draws the comparison of --lengths"),
        (
            ["--gpus", "512", "--gpu", "h100", "--lengths", "32768", "--output", "x.xyz"],
            "--output x.xyz: must end in .png or .svg",
        ),
        (
            ["--gpus", "512", "--gpu", "h100", "--lengths", "131072", "--output", "README.md/x.png"],
            "--output README.md/x.png: cannot be written",
        ),
        (["--gpus", "512", "--gpu", "h100", "--dry-run"], "--dry-run: is an option of training"),
        (["--gpus", "512", "--gpu", "h100", "--world-size", "8"], "--world-size: is an option of training"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    done = run("--config", RECIPE, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
