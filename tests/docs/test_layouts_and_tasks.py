"""Layouts of the documentation pass their dry run, and tasks within a configuration take their options."""

import re
import shlex

import pytest
import yaml

import pretrain_zebra
from megatron_zebra.config.load import load_config
from megatron_zebra.training.tasks import read_options
from tests.docs.pages import ROOT, blocks

COMMANDS = [
    line
    for block in blocks(ROOT / "docs/parallelism.md", "bash")
    for line in block.text.splitlines()
    if "pretrain_zebra.py" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_layouts_pass_their_dry_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launcher, words = command.split("pretrain_zebra.py")
    world = re.search(r"--(?:nproc-per-node|world-size) (\d+)", command)
    assert world is not None
    extra = ["--dry-run", "--world-size", world[1]] if launcher.startswith("torchrun") else []
    assert pretrain_zebra.main([*shlex.split(words), *extra]) == 0


def test_options_of_tasks_in_training_are_accepted() -> None:
    given = yaml.safe_load(blocks(ROOT / "docs/evaluation.md", "yaml")[0].text)
    config = load_config(None, {"evaluation.tasks": given["evaluation"]["tasks"], "data.tokenizer": "tok.model"})
    assert len(config.evaluation.tasks) >= 4
    for task in config.evaluation.tasks:
        read_options(task, config)


def test_there_are_such_commands() -> None:
    assert len(COMMANDS) >= 4
