"""The page in a real browser: what it draws is what the run folders hold, on any screen, in light and dark."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from megatron_zebra.report.folder import read_runs
from megatron_zebra.report.page import write_report
from megatron_zebra.training.run_folder import write_description
from tests.report.folders import evaluate, run_folder
from tests.training.cases import small
from tests.training.runs import metrics, run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BY_STEP = {  # title: column, its value of one unit
    "Learning rate": ("learning_rate", 1),
    "Gradient norm before clipping": ("grad_norm", 1),
    "Throughput": ("tokens_per_second", 1),
    "MFU, windows counted": ("mfu", 0.01),
    "Model FLOP/s, windows counted": ("flops_per_second", 1e9),
    "Peak memory": ("peak_memory_bytes", 2**30),
    "Whole step": ("step_time", 1),
    "Data": ("data_time", 1),
    "Compute": ("compute_time", 1),
    "Optimizer": ("optimizer_time", 1),
    "Saves": ("save_time", 1),
    "Exchange": ("exchange_time", 1),
    "Bytes received: cp local": ("communication_bytes/cp local", 2**20),
    "Bytes received: cp global": ("communication_bytes/cp global", 2**20),
}
# What plotly has made of each chart's data: calcdata holds the points that it draws.
DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [chart.dataset.title, {
  lines: chart._fullData.map((trace, i) => ({name: trace.name, colour: (trace.line || {}).color,
    x: chart.calcdata[i].map((point) => point.x), y: chart.calcdata[i].map((point) => point.y ?? null)})),
  painted: chart.querySelectorAll(".scatterlayer .trace, .heatmaplayer image, .barlayer .trace").length,
  text: getComputedStyle(chart.querySelector(".xtick text")).fill,
  overflow: chart.querySelector("svg").getBoundingClientRect().right - chart.getBoundingClientRect().right}]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian, Ubuntu: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(scope="module")
def folders(run_distributed: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained models of different depth on two ranks, the first longer, evaluated and divided over the sequence."""
    made = []
    for name, settings in {
        "zebra": {"parallel__cp": 2, "training__steps": 22, "logging__peak_tflops": 1.0},
        "full": {"model__layer_group_size": 1, "training__steps": 5},
    }.items():
        settings |= {"evaluation__interval": 4, "evaluation__rows": 2, "data__split": [0.8, 0.2, 0.0]}
        folder = tmp_path_factory.mktemp("runs") / name
        (seen, _) = run_distributed(run, 2, folder, settings, cp=settings.get("parallel__cp", 1))
        assert seen.error is None
        write_description(folder, small(**settings), 2, 101)
        made.append(folder)
    trained = (made[0] / "evaluation.jsonl").read_text()
    evaluate(made[0])
    (made[0] / "evaluation.jsonl").write_text(trained)
    return made


@pytest.fixture(scope="module")
def file(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_report(read_runs(folders), file)
    return file


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page without a network, on which any complaint or request but for the file itself fails the test."""
    complaints: list[str] = []
    context = browser.new_context(**getattr(request, "param", {}), offline=True)
    opened = context.new_page()
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda wanted: wanted.url.startswith(("file:", "data:")) or complaints.append(wanted.url))
    yield opened
    context.close()
    assert complaints == []


def brightness(colour: str) -> float:
    """Of "rgb(r, g, b)", 0 to 1."""
    return float(np.mean([int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]) / 255)


def same(drawn: list[Any], expected: list[Any]) -> bool:
    return np.allclose(np.array(drawn, float), np.array(expected, float), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("page", [{"color_scheme": "light", "viewport": {"width": 1280, "height": 900}}], indirect=True)
def test_every_chart_holds_every_point_of_both_runs_and_follows_the_dark(
    page: Page, file: Path, folders: list[Path]
) -> None:
    page.goto(file.as_uri())
    drawn = page.evaluate(DRAWN)
    for title, (column, unit) in BY_STEP.items():
        recorded = {folder.name: metrics(folder) for folder in folders}
        expected = {
            name: [line.get(column) for line in lines]
            for name, lines in recorded.items()
            if any(line.get(column) is not None for line in lines)
        }
        lines = {line["name"]: line for line in drawn.pop(title)["lines"]}
        assert lines.keys() == expected.keys(), title
        for name, values in expected.items():
            assert same(lines[name]["x"], [line["step"] for line in recorded[name]])
            assert same(lines[name]["y"], [value / unit if value is not None else None for value in values]), title
    _loss(drawn.pop("Training and held-out loss"), folders)
    _by_position(drawn, folders)
    assert {title for title in drawn if title.startswith("zebra: Answers")} == {
        f"zebra: Answers by length and depth: {task}" for task in ("answers", "passkey", "needle")
    }
    assert {title for title in drawn if "Answers" not in title} == {"Bytes by layer kind"}
    colours = _colours(page)
    assert min(brightness(colours["page"]), 1 - brightness(colours["ink"]), 1 - brightness(colours["charts"])) > 0.8
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    colours = _colours(page)
    assert min(1 - brightness(colours["page"]), brightness(colours["ink"]), brightness(colours["charts"])) > 0.8


@pytest.mark.parametrize(
    "page",
    [{"color_scheme": "dark", "viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}],
    indirect=True,
)
def test_a_phone_in_the_dark(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    drawn = page.evaluate(DRAWN)
    assert all(chart["painted"] for chart in drawn.values())
    assert max(chart["overflow"] for chart in drawn.values()) <= 0
    assert min(brightness(chart["text"]) for chart in drawn.values()) > 0.8
    # Wide tables scroll within themselves.
    wide = page.evaluate("[...document.querySelectorAll('.wide')].map((box) => box.getBoundingClientRect().right)")
    assert max(wide) <= 360


PLOT = """(title) => document.querySelector(`.chart[data-title="${title}"] .nsewdrag`).getBoundingClientRect().height"""


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}, "is_mobile": True}], indirect=True)
def test_lines_keep_their_room_under_many_names(page: Page, tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / f"a-run-of-a-long-name-and-number-{number}", 3) for number in range(10)]
    room = []
    for count in (1, 10):
        write_report(read_runs(folders[:count]), tmp_path / "report.html")
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_timeout(300)
        room.append(page.evaluate(PLOT, "Throughput"))
    assert room[1] > 0.75 * room[0]


def _loss(chart: dict[str, Any], folders: list[Path]) -> None:
    for folder in folders:
        lines = [line for line in chart["lines"] if line["name"] == f"{folder.name}: training"]
        assert same(lines[0]["y"], [line["loss"] for line in metrics(folder)])
        (held_out,) = (line for line in chart["lines"] if line["name"] == f"{folder.name}: held out: synthetic")
        expected = {line["step"]: line["valid/synthetic"] for line in metrics(folder) if "valid/synthetic" in line}
        assert same(held_out["x"], list(expected))
        assert same(held_out["y"], list(expected.values()))
        assert held_out["colour"] == lines[0]["colour"]
    assert len({line["colour"] for line in chart["lines"]}) == 2


def _by_position(drawn: dict[str, Any], folders: list[Path]) -> None:
    over_time = drawn.pop("Loss by position over time: synthetic")["lines"]
    last = {line["name"]: line for line in drawn.pop("Loss by position")["lines"]}
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        table = np.array([line["sets"]["synthetic"]["loss_by_position"] for line in lines], float)
        own, over_time = over_time[: table.shape[1]], over_time[table.shape[1] :]
        assert same([line["y"] for line in own], table.T.tolist())
        steps = np.array([record["step"] for record in lines], float)
        gaps = np.where(np.isnan(table.T), np.nan, 1.0)
        assert same([line["x"] for line in own], (steps * gaps).tolist())
        assert same(last[f"{folder.name}: synthetic, last in training"]["y"], table[-1].tolist())
    assert over_time == []


def _colours(page: Page) -> dict[str, str]:
    body = "getComputedStyle(document.body)"
    found: dict[str, str] = page.evaluate(f"({{page: {body}.backgroundColor, ink: {body}.color}})")
    texts = {chart["text"] for chart in page.evaluate(DRAWN).values()}
    assert len(texts) == 1
    return found | {"charts": texts.pop()}
