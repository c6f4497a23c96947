"""Pictures of a run folder: written for what is there, one clear line for what is broken."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_zebra.config.load import load_config, to_yaml
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import resolve
from megatron_zebra.model.pattern import layer_kinds
from megatron_zebra.planning.devices import DEVICES
from megatron_zebra.planning.search import at_lengths
from megatron_zebra.planning.step_time import Machine
from megatron_zebra.report.plan import lengths_figure
from megatron_zebra.report.plots import by_position_figure, write_plots
from megatron_zebra.report.run import ByPosition, read_by_position, read_metrics
from megatron_zebra.report.smooth import smooth
from megatron_zebra.report.stripes import write_stripes

H100 = Machine(next(device for device in DEVICES if device.name == "H100"))
PNG = b"\x89PNG"


def record(step: int, loss: float | None) -> dict[str, object]:
    values = {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 5e3,
        "consumed_tokens": step * 10,
    }
    return values | ({"valid/held": 2.5} if step % 10 == 0 else {})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 30 steps, one of them without a finite loss, and its evaluation."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(None, {"model.window_size": 64})))
    lines = [json.dumps(record(step, None if step == 7 else 8.0 / step)) for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluation = {"sets": {"held": {"edges": [0, 16, 32, 2048], "loss_by_position": [3.0, None, 2.0]}}}
    (folder / "evaluation" / "perplexity.json").write_text(json.dumps(evaluation))
    return folder


def test_all_pictures_of_an_evaluated_run(run_dir: Path) -> None:
    written = write_plots(run_dir)
    assert [path.name for path in written] == ["loss.png", "loss_by_position.png", "stripes.png", "overview.png"]
    assert all(path.parent == run_dir / "plots" and path.read_bytes().startswith(PNG) for path in written)
    assert len(list((run_dir / "plots").iterdir())) == len(written)


def test_names_are_no_mathematics_and_none_is_left_out(run_dir: Path) -> None:
    folder = run_dir.rename(run_dir.parent / r"$\no{mathematics$")
    values = ByPosition([0, 16, 32], np.array([2.0, 1.0]))
    write_plots(folder)
    drawn = by_position_figure({"_a$b$": values, "c": values}, None)
    assert [text.get_text() for text in drawn.axes[0].get_legend().get_texts()] == [r" _a\$b\$", "c"]


def test_a_run_without_evaluation(run_dir: Path) -> None:
    (run_dir / "evaluation" / "perplexity.json").unlink()
    assert [path.name for path in write_plots(run_dir)] == ["loss.png", "stripes.png", "overview.png"]


def test_a_run_that_just_began_and_never_had_a_finite_loss(run_dir: Path) -> None:
    lines = [json.dumps({"step": 1, "loss": None})]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert len(write_plots(run_dir)) == 4


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"", "holds no step yet"),
        (b"\n\n", "holds no step yet"),
        (b'{"step": 1, "loss"', "holds no step yet"),
        (b'{"step": 1}\n{oops}\n', "line 2: is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1: is not JSON"),
        (b"[1, 2]\n", "line 1: is not a step's record"),
        (b'{"loss": 2.0}\n', "line 1: is not a step's record"),
        (b'{"step": "one"}\n', "line 1: is not a step's record"),
        (b'{"step": true}\n', "line 1: is not a step's record"),
        (b"\xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_broken_metrics_are_one_line(run_dir: Path, content: bytes | None, complaint: str) -> None:
    file = run_dir / "metrics.jsonl"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        write_plots(run_dir)
    assert "\n" not in str(caught.value)
    assert "metrics.jsonl" in str(caught.value)
    assert not (run_dir / "plots").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"sets": []}',
        '{"sets": {"a": {"edges": [0, 1]}}}',
        '{"sets": {"a": {"edges": [0, 0], "loss_by_position": [1.0]}}}',
        '{"sets": {"a": {"edges": [0, 1], "loss_by_position": [1.0, 2.0]}}}',
    ],
)
def test_a_broken_evaluation_is_one_line(run_dir: Path, content: str) -> None:
    (run_dir / "evaluation" / "perplexity.json").write_text(content)
    with pytest.raises(UserError, match="perplexity") as caught:
        write_plots(run_dir)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics"):
        write_plots(tmp_path)


def test_what_json_lacks_is_a_gap(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": null, "mfu": {10**400}}}\n{{"step": 2, "loss": 1.5, "note": "x"}}\n{{"step": 3, "lo'
    )
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert metrics.steps.tolist() == [1, 2]
    assert math.isnan(metrics.column("loss")[0])
    assert metrics.column("loss")[1] == 1.5
    assert np.isnan(metrics.column("note")).all()
    assert np.isnan(metrics.column("mfu")).all()
    assert np.isnan(metrics.column("absent")).all()
    assert metrics.validation == {}
    assert np.isnan(read_by_position(run_dir / "evaluation" / "perplexity.json")["held"].loss[1])


def test_the_running_mean_follows_a_line_and_leaves_gaps() -> None:
    line = np.linspace(8.0, 2.0, 200)
    assert np.allclose(smooth(line), line)
    line[50] = math.nan
    smoothed = smooth(line)
    assert math.isnan(smoothed[50])
    assert np.allclose(np.delete(smoothed, 50), np.delete(line, 50), atol=0.03)


def test_stripes_are_written_alike_each_time(tmp_path: Path) -> None:
    first = write_stripes(tmp_path / "a" / "stripes.svg", layer_kinds(16, 4), 512).read_bytes()
    second = write_stripes(tmp_path / "stripes.svg", layer_kinds(16, 4), 512).read_bytes()
    assert first == second
    assert len(first) < 100_000
    for kinds in (layer_kinds(1, 1), layer_kinds(126, 6)):
        assert write_stripes(tmp_path / "stripes.png", kinds, 4096).read_bytes().startswith(PNG)


def test_lengths_of_a_plan_are_named_as_they_are() -> None:
    config = load_config(None, {"model.vocab_size": 256, "data.train": ["text"]})
    found, _ = at_lengths(resolve(config.model, 0, 2048), config, 1, H100, [512, 4096, 10000])
    speed, memory = lengths_figure(found, 2**30).axes
    for axes in (speed, memory):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "4k", "10000"]
