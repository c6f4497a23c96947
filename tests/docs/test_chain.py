"""The commands of docs/pretraining.md one after another, as they stand but for sizes: from text to an exported model."""

import importlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import pretrain_zebra
from megatron_zebra.errors import run_tool
from tests.docs.pages import ROOT, blocks
from tests.processes import Ranks

PAGE = ROOT / "docs/pretraining.md"
SMALLER = {
    "--vocab-size": "400",
    "--model.vocab_size": "400",
    "--workers": "1",
    "--world-size": "2",
    "--sequence-length 2048 16384": "--sequence-length 64 128",
    "--lengths 4096 16384": "--lengths 512 --examples 1 --depths 1 --tasks passkey --repeat",
    "--prompt": "The",
}
TINY = {
    "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "window_size": 16},
    "data": {"sequence_length": 128, "sequence_schedule": [{"steps": 1, "sequence_length": 64}]},
    "training": {"steps": 3, "global_batch_size": 4},
    "optimizer": {"warmup_steps": 1},
    "logging": {"tensorboard": False},
}


def train(folder: Path, words: list[str]) -> None:
    """One rank of pretrain_zebra.py in ``folder``."""
    os.chdir(folder)
    assert pretrain_zebra.main(words) == 0


def smaller(line: str) -> list[str]:
    """The words of a command of the page, with sizes for a test."""
    for old, new in SMALLER.items():
        if " " in old:
            assert old in line or old.split()[0] not in line, line
            line = line.replace(old, new)
    words = shlex.split(line)
    for number, word in enumerate(words[:-1]):
        if word in SMALLER:
            words[number + 1] = SMALLER[word]
    return words


def test_from_text_to_an_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages = sorted((ROOT / "docs").glob("*.md"))
    for name, kept in (("text", pages[:6]), ("held-out", pages[6:7])):
        (tmp_path / name).mkdir()
        for page in kept:
            (tmp_path / name / page.name).write_text(page.read_text())
    config = yaml.safe_load(blocks(PAGE, "yaml")[0].text)
    (tmp_path / "my.yaml").write_text(
        yaml.dump({name: {**config.get(name, {}), **TINY.get(name, {})} for name in config})
    )

    (block,) = blocks(PAGE, "bash")
    done = []
    for line in block.text.splitlines():
        words = smaller(line)
        if words[0] == "mkdir":
            (tmp_path / words[-1]).mkdir()
        elif words[0] == "torchrun":
            ranks = Ranks(tmp_path, train, 2, tmp_path, words[words.index("pretrain_zebra.py") + 1 :])
            ends = ranks.wait(240)
            assert [end.code for end in ends] == [0, 0], ends[0].stderr
        elif words[1] == "pretrain_zebra.py":
            assert pretrain_zebra.main(words[2:]) == 0
        else:
            more = {
                "tools/generate.py": ["--max-new-tokens", "4", "--device", "cpu"],
                "tools/evaluate.py": ["--device", "cpu"],
            }
            monkeypatch.setattr(sys, "argv", [*words[1:], *more.get(words[1], [])])
            run_tool(importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main)
        done.append(words)

    assert len(done) >= 11
    records = [json.loads(text) for text in (tmp_path / "runs/my/metrics.jsonl").read_text().splitlines()]
    assert [record["sequence_length"] for record in records] == [64, 128, 128]
    assert (tmp_path / "runs/my/report.html").exists()
    assert {file.stem for file in (tmp_path / "runs/my/evaluation").glob("*.json")} >= {"perplexity", "retrieval"}
    assert json.loads((tmp_path / "my-zebra/config.json").read_text())["architectures"] == ["CwmForCausalLM"]
