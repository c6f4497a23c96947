"""Commands of the documentation on layouts and on reports are accepted as they stand."""

import re
import shlex
from pathlib import Path

import pytest

import pretrain_zebra
from tools import report

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/parallelism.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if "pretrain_zebra.py" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_layouts_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launcher, words = command.split("pretrain_zebra.py")
    world = re.search(r"--(?:nproc-per-node|world-size) (\d+)", command)
    assert world is not None
    extra = ["--dry-run", "--world-size", world[1]] if launcher.startswith("torchrun") else []
    assert pretrain_zebra.main([*shlex.split(words), *extra]) == 0


def test_there_are_such_commands() -> None:
    assert len(COMMANDS) >= 4


def test_commands_on_reports_are_accepted() -> None:
    text = (ROOT / "docs/reports.md").read_text()
    commands = re.findall(r"^python tools/report.py (.*)$", text, re.MULTILINE)
    runs = [report.parser().parse_args(shlex.split(words, comments=True)).runs for words in commands]
    assert [len(given) for given in runs] == [1, 2]
