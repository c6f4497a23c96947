"""What a report says of run folders, and one line for what is broken. How it looks: test_page.py."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from megatron_zebra.errors import UserError, run_tool
from megatron_zebra.planning.communication import busiest_bytes
from megatron_zebra.report.charts import COLOURS, Chart
from megatron_zebra.report.folder import Run, Saved, read_runs
from megatron_zebra.report.page import differences, facts, page, write_report
from megatron_zebra.report.sections import sections
from tests.report.folders import EDGES, TABLE, evaluate, record, run_folder, save, write_lines
from tools import report

ROOT = Path(__file__).resolve().parent.parent.parent


def _edges(*edges: int) -> str:
    return json.dumps({"sets": {"held": {"edges": edges, "loss_by_position": [2.0, 1.0]}}})


def charts(runs: list[Run]) -> dict[str, Chart]:
    return {chart.title: chart for section in sections(runs) for chart in section.charts}


def absent(runs: list[Run]) -> dict[str, str]:
    return {part.title: part.reason for section in sections(runs) for part in section.absent}


def traces(chart: Chart) -> dict[str, Any]:
    return {trace.name: trace for trace in chart.figure.data}


def test_all_charts_of_an_evaluated_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    evaluate(folder)
    (run,) = runs = read_runs([folder])
    found = charts(runs)
    by_step = {"Training and held-out loss", "Learning rate", "Gradient norm before clipping", "Throughput"}
    context = {"Loss by position", "Loss by position over time: held"}
    maps = {f"Answers by length and depth: {task}" for task in ("answers", "passkey", "needle")}
    assert found.keys() == by_step | context | maps
    for title in maps:
        (drawn,) = found[title].figure.data
        assert np.array_equal(drawn.z, np.array(TABLE["exact"], float), equal_nan=True)
        assert (list(drawn.x), list(drawn.y)) == (["0–0.5", "0.5–1"], ["1,024", "4,096"])
    lines = traces(found["Loss by position over time: held"])
    assert np.allclose([line.y for line in lines.values()], [[3.0, 2.5], [2.9, 2.4], [np.nan, 2.3]], equal_nan=True)
    assert all(list(line.x) == [10, 20] for line in lines.values())
    assert list(lines) == ["0–15", "16–31", "32–63"]
    by_position = traces(found["Loss by position"])
    assert list(by_position["held, evaluated"].y) == pytest.approx([2.4, 2.2, 2.1])
    assert list(by_position["held, last in training"].y) == pytest.approx([2.5, 2.4, 2.3])
    assert list(by_position["held, evaluated"].x) == [8, 24, 48]
    assert list(found["Loss by position"].figure.layout.xaxis.tickvals) == EDGES[1:]
    assert run.evaluations[0][0] == 10


def test_the_tasks_of_a_training_and_their_newest_results(tmp_path: Path) -> None:
    tasks = [{"task": "retrieval", "interval": 10, "name": name} for name in ("far", "near")] + [
        {"task": "perplexity", "interval": 10}
    ]
    folder = run_folder(tmp_path / "run", settings={"evaluation.tasks": tasks})
    lines = [record(step, **({"far/passkey/exact": step / 20} if step % 10 == 0 else {})) for step in range(1, 21)]
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "evaluation").mkdir()
    for step in (10, 20):
        table = TABLE | {"exact": [[step / 20, 0.0], [0.0, 0.0]], "depth_edges": [0, 1 / 3, 1]}
        losses = {"held": {"edges": EDGES, "loss_by_position": [step, 2.2, 2.1]}}
        retrieval = {"tasks": {"passkey": table}}
        for name, document in (
            ("far", retrieval),
            ("near", {"tasks": {"passkey": TABLE}}),
            ("perplexity", {"sets": losses}),
        ):
            (folder / "evaluation" / f"{name}-step-{step:08d}.json").write_text(json.dumps({"step": step, **document}))
    runs = read_runs([folder])
    found = charts(runs)
    line = traces(found["far"])["passkey/exact"]
    assert (list(line.x), list(line.y)) == ([10, 20], [0.5, 1.0])
    assert absent(runs)["perplexity"] == "has not run yet (evaluation.tasks)"
    (drawn,) = found["Answers by length and depth: passkey, far, step 20"].figure.data
    assert drawn.z[0][0] == 1
    assert list(drawn.x) == ["0–0.333", "0.333–1"]
    (drawn,) = found["Answers by length and depth: passkey, near, step 20"].figure.data
    assert drawn.z[0][1] == 0.5
    assert traces(found["Loss by position"])["held, step 20, evaluated"].y[0] == 20


def test_what_is_left_out_says_why_and_no_chart_is_empty(tmp_path: Path) -> None:
    write_lines(run_folder(tmp_path / "run") / "metrics.jsonl", [{"step": 1, "loss": 2.0, "grad_norm": None}])
    runs = read_runs([tmp_path / "run"])
    assert charts(runs).keys() == {"Training and held-out loss"}
    assert not charts(runs)["Training and held-out loss"].note  # no running mean
    reasons = absent(runs)
    assert reasons["Gradient norm before clipping"] == "not recorded"
    assert "logging.peak_tflops" in reasons["MFU, windows counted"]
    assert "evaluation.interval" in reasons["Loss by position over time"]
    assert reasons["Stage balance"] == "no run has a pipeline"
    assert reasons["Skipped steps"] == "not recorded"
    html = page(runs)
    for title, reason in reasons.items():
        assert f"<li>{title}: {escape(reason)}.</li>" in html
    assert html.count('<div class="chart"') == 1


def test_a_run_that_never_had_a_finite_loss(tmp_path: Path) -> None:
    write_lines(run_folder(tmp_path / "run") / "metrics.jsonl", [{"step": 1, "loss": None, "skipped_steps": 1}])
    runs = read_runs([tmp_path / "run"])
    assert charts(runs).keys() == {"Skipped steps"}
    assert absent(runs)["Training and held-out loss"] == "no step had a finite loss"


def test_several_runs_share_charts_and_who_is_missing_is_said(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 5, {"training.seed": 7})
    write_lines(first / "metrics.jsonl", [record(step, mfu=0.4) for step in range(1, 40)])
    runs = read_runs([first, second])
    found = charts(runs)
    rate = traces(found["Learning rate"])
    assert {name: len(line.x) for name, line in rate.items()} == {"a": 39, "b": 5}
    assert len({line.line.color for line in rate.values()}) == 2
    assert list(traces(found["MFU, windows counted"])["a"].y) == pytest.approx([40.0] * 39)
    assert found["MFU, windows counted"].note.startswith("Matrix products")
    assert "Not of b: the device's peak is not known" in found["MFU, windows counted"].note
    assert differences(runs) == {"training.seed": [str(runs[0].config.training.seed), "7"]}
    assert facts(runs)["steps"] == ["39 of 1,000", "5 of 1,000"]
    assert facts(runs)["last training loss"] == [f"{8 / 39:.4f}", f"{8 / 5:.4f}"]


def test_what_a_plan_says_of_a_run(tmp_path: Path) -> None:
    settings = {"parallel.pp": 2, "parallel.cp": 2, "model.num_layers": 5, "training.global_batch_size": 8}
    folder = run_folder(tmp_path / "run", 3, settings, world_size=4)
    names = {"communication_bytes/cp local": 2**20, "communication_bytes/data": 8}
    write_lines(folder / "metrics.jsonl", [record(step, **names) for step in (1, 2)])
    (run,) = runs = read_runs([folder])
    found = charts(runs)
    (balance,) = found["Stage balance"].figure.data
    assert len(balance.y) == 2
    assert np.mean(balance.y) == pytest.approx(1)
    assert list(balance.y) == pytest.approx(np.array(run.stages.costs) * 2 / sum(run.stages.costs))
    kinds = traces(found["Bytes by layer kind"])
    assert run.layout is not None
    expected = busiest_bytes(run.arch, run.config, run.layout, run.stages)
    planned = dict(zip(kinds["planned"].x, np.multiply(kinds["planned"].y, 2**20)))
    assert planned == pytest.approx(dict(expected))
    assert {"cp local", "cp global", "pp", "data"} <= planned.keys()
    # DeepSpeed moves gradients itself under ZeRO: those 8 bytes are no measurement of it.
    assert (list(kinds["measured"].x), list(kinds["measured"].y)) == (["cp local"], [1.0])
    assert "Bytes received: data" not in found
    assert facts(runs)["processes"] == ["4: dp 1, cp 2, pp 2, tp 1"]
    assert "planned memory, fullest rank" in facts(runs)


def test_an_older_run_without_its_environment(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "environment.json").unlink()
    runs = read_runs([folder])
    assert not {"parameters", "processes", "planned memory, fullest rank"} & facts(runs).keys()
    assert "Bytes by layer kind" in absent(runs)
    page(runs)


def test_a_vocabulary_that_is_no_number_of_tokens_is_unknown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps({"world_size": 1, "vocab_size": 10**400}))
    runs = read_runs([folder])
    assert "parameters" not in facts(runs)
    page(runs)


def test_checkpoints_and_their_sizes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    save(folder, 10, 3 << 20)
    save(folder, 20, 1000, complete=False)
    (run,) = read_runs([folder])
    assert run.checkpoints == [Saved(10, 3 << 20, True), Saved(20, 1000, False)]
    assert "<td>10</td><td>3.00 MiB</td><td></td>" in page([run])


def test_names_are_text_and_not_html(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "<b>&run")
    write_lines(folder / "metrics.jsonl", [record(step, **{"valid/</script><i>x": 2.0}) for step in (1, 2)])
    runs = read_runs([folder, run_folder(tmp_path / "other")])
    drawn = [trace.name for chart in charts(runs).values() for trace in chart.figure.data]  # plotly reads HTML in names
    assert drawn
    assert not [name for name in drawn if "<" in name]
    html = page(runs)
    assert "<i>x" not in html
    assert "<b>&run" not in html
    assert "&lt;b&gt;&amp;run" in html


def test_a_name_in_a_title_is_escaped_once(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name) for name in ("a & b", "other")]
    evaluate(folders[0])
    for runs, title in (
        (read_runs(folders), "a &amp; b: Answers by length and depth: needle"),
        (read_runs(folders[:1]), "Answers by length and depth: needle"),
    ):
        assert f"<h3>{title} " in page(runs)


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [record(1, **{"valid/\ud800": 2.0})])
    write_report(read_runs([folder]), tmp_path / "report.html")
    assert "held out: ?" in (tmp_path / "report.html").read_text()


def test_a_value_too_large_to_show_is_none(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [record(step, loss=1e308, step_time=1e308) for step in (1, 2)])
    runs = read_runs([folder])
    assert facts(runs)["time in steps"] == ["0:00:00"]
    assert absent(runs)["Training and held-out loss"] == "no step had a finite loss"
    page(runs)


def test_more_runs_than_colours_look_different(tmp_path: Path) -> None:
    runs = read_runs([run_folder(tmp_path / str(number), 3) for number in range(2 * len(COLOURS))])
    lines = charts(runs)["Learning rate"].figure.data
    assert len({(line.line.color, line.line.dash) for line in lines}) == len(runs)


def test_names_of_windows_near_each_other_stand_one_below_the_other(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / str(window), settings={"model.window_size": window}) for window in (16, 32)]
    for folder in folders:
        evaluate(folder)
    first, second = charts(read_runs(folders))["Loss by position"].figure.layout.shapes
    assert (first.label.text, second.label.text) == ("window 16", "window 32")
    assert first.y1 > second.y1


def test_a_file_that_a_run_removes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run")
    save(folder, 10, 1000)
    listed = os.walk

    def walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for place, folders, files in listed(top):
            (Path(place) / "data").unlink()
            yield place, folders, files

    monkeypatch.setattr(os, "walk", walk)
    assert read_runs([folder])[0].checkpoints == [Saved(10, 2, True)]


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run"), run_folder(tmp_path / "c")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "c"]
    with pytest.raises(UserError, match="is given twice"):
        read_runs([folders[0], tmp_path / "b" / ".." / "a" / "run"])


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("metrics.jsonl", '{"step": 1}\n{oops}\n', "line 2: is not JSON"),
        ("metrics.jsonl", "", "holds no step yet"),
        ("metrics.jsonl", f'{{"step": {10**400}}}\n', "line 1: is not a step's record"),
        ("metrics.jsonl", '{"step": -1}\n', "line 1: is not a step's record"),
        ("metrics.jsonl", None, "cannot be read"),
        ("config.yaml", None, "cannot be read"),
        ("config.yaml", "model: {hidden_size: many}\nmodle: {}", "hidden_size"),
        ("config.yaml", "model: {num_heads: 7, hidden_size: 64}", "num_heads"),
        (
            "config.yaml",
            "parallel: {cp: 2}\ndata: {train: [x]}",
            "parallel.tp x cp x pp",
        ),  # environment.json says one process
        ("config.yaml", "a: [", "config.yaml"),
        ("environment.json", "{", "is not JSON"),
        ("environment.json", "[]", "is not what training writes"),
        ("evaluation.jsonl", '{"step": 1, "sets": {"a": {}}}\n', "line 1: is not an evaluation's result"),
        ("evaluation.jsonl", '{"step": 1}\n', "line 1: is not an evaluation's result"),
        ("evaluation.jsonl", f'{{"step": {10**400}, "sets": {{}}}}\n', "line 1: is not a step's record"),
        ("evaluation/perplexity.json", "{}", "is not an evaluation's result"),
        ("evaluation/perplexity.json", _edges(0, 1, 10**400), "needs rising edges from 0"),
        ("evaluation/perplexity.json", _edges(-2, 0, 5), "needs rising edges from 0"),
        ("evaluation/answers.json", '{"exact": 1}', "is not an evaluation's result"),
        ("evaluation/retrieval.json", "nothing", "is not JSON"),
        ("evaluation/retrieval.json", "[" * 100_000, "is not JSON"),
        ("evaluation/retrieval.json", '{"a":' * 900 + "1" + "}" * 900, "is not an evaluation's result"),
        ("evaluation/retrieval.json", json.dumps(TABLE | {"depth_edges": [0, 1, 10**400]}), "are not numbers"),
        ("evaluation/retrieval.json", json.dumps(TABLE | {"lengths": [1024]}), "a row a length"),
        ("evaluation/retrieval.json", json.dumps(TABLE | {"exact": [["x", 1], [1, 1]]}), "are not numbers"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str | None,
    complaint: str,
) -> None:
    folder = run_folder(tmp_path / "run")
    evaluate(folder)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        run_tool(report.main)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {folder}")
    assert err.count("\n") == 1
    assert Path(file).name in err
    assert complaint in err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["{tmp}/none"], "none: no such run folder"),
        (["{tmp}/file"], "file: is no run folder"),
        (["{tmp}/run", "--output", "{tmp}"], "--output {tmp}: cannot be written"),
        (["{tmp}/run", "--output", "{tmp}/file/x.html"], "--output {tmp}/file/x.html: cannot be written"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    run_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["report.py", *(word.format(tmp=tmp_path) for word in words)])
    with pytest.raises(SystemExit, match="2"):
        run_tool(report.main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert complaint.format(tmp=tmp_path) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    code = (
        "import sys; from tools import report; report.main(); assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert "report.html: 4." in done.stdout
