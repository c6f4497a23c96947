"""Commands of the documentation are accepted as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import pretrain_zebra
from megatron_zebra.config.load import load_config
from megatron_zebra.training.tasks import read_options
from tools import evaluate, report

ROOT = Path(__file__).resolve().parent.parent.parent


def commands(page: str, tool: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if tool in line]


COMMANDS = commands("docs/parallelism.md", "pretrain_zebra.py")
JUDGING = [
    command
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for command in commands(str(page), "tools/evaluate.py")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_layouts_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launcher, words = command.split("pretrain_zebra.py")
    world = re.search(r"--(?:nproc-per-node|world-size) (\d+)", command)
    assert world is not None
    extra = ["--dry-run", "--world-size", world[1]] if launcher.startswith("torchrun") else []
    assert pretrain_zebra.main([*shlex.split(words), *extra]) == 0


@pytest.mark.parametrize("command", JUDGING)
def test_commands_that_judge_are_accepted(command: str) -> None:
    evaluate.parser().parse_args(shlex.split(command.split("tools/evaluate.py")[1], comments=True))


def test_options_of_tasks_in_training_are_accepted() -> None:
    text = (ROOT / "docs/evaluation.md").read_text()
    given = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    config = load_config(None, {"evaluation.tasks": given["evaluation"]["tasks"], "data.tokenizer": "tok.model"})
    assert len(config.evaluation.tasks) >= 4
    for task in config.evaluation.tasks:
        read_options(task, config)


def test_there_are_such_commands() -> None:
    assert len(COMMANDS) >= 4
    assert len(JUDGING) >= 12


def test_commands_on_reports_are_accepted() -> None:
    text = (ROOT / "docs/reports.md").read_text()
    commands = re.findall(r"^python tools/report.py (.*)$", text, re.MULTILINE)
    runs = [report.parser().parse_args(shlex.split(words, comments=True)).runs for words in commands]
    assert [len(given) for given in runs] == [1, 2]
