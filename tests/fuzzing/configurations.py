"""Configurations: files and words of a command line, taken as far as the dry run."""

import contextlib
import copy
import io
import os
import random
import re
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import pretrain_zebra
from megatron_zebra.config.help import Key, all_keys
from megatron_zebra.config.load import load_config, parse_words, to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.errors import UserError
from tests.fuzzing.damage import NUMBERS, TEXTS, damaged_bytes, damaged_tree, few, odd_value
from tests.fuzzing.subject import Outcome, Trial

ROOT = Path(__file__).resolve().parents[2]
NAMED = (
    r"(^|[ '\[{(])(--|section|" + "|".join(Config.model_fields) + r")|synthetic data|weights of the sources"
    r"|is not an option|no such key|evaluation\.tasks"
)
# What YAML can be made to say; %s is a key.
ODD_YAML = [
    "%s: &a [*a]", "%s: &a {b: *a}", "%s: *nothing", "%s: !!python/object/apply:os.system ['true']", "%s: !!binary aGVsbG8=",
    "%s: !!set {a, b}", "%s: !!omap [a: 1]", "%s: !!float 1", "%s: !!int x", "%s: !!timestamp 2024-13-45", "%s: 2024-01-01",
    "%s: 1:30:00", "%s: 0x1F", "%s: 0o17", "%s: 017", "%s: 1_000", "%s: .inf", "%s: -.INF", "%s: .nan", "%s: 1e999", "%s: yes",
    "%s: ~", "%s:", "%s: =", "%s: <<", "<<: {%s: 1}", "<<: [{%s: 1}, 3]", "? [a, b]\n: %s", "? {a: 1}\n: %s", "%s: |\n  text\n  more",
    "%s: >-\n  text", "%s: 'open", '%s: "\\x00"', '%s: "\\uD800"', "%s: \t1", "%s: @x", "%s: `x`", "%s: %%x", "--- \n%s: 1\n--- \n%s: 2",
    "%s: 1\n%s: 2", "!!str %s: 1", "1: %s", "null: %s", "true: %s", "%%YAML 9.9\n---\n%s: 1", "%s: " + "[" * 500, "%s: " + "9" * 6000,
    "%s: " + "{a: " * 400, "a: &a [x]\nb: &b [" + "*a, " * 90 + "]\nc: &c [" + "*b, " * 90 + "]\n%s: [" + "*c, " * 90 + "]",
    "%s: \u2028x", "\ufeff%s: 1", "%s: \x85", "\u202e%s: 1", "%s: 12345678901234567890", "%s: -0", "%s: 1.", "%s: '1'", "- %s",
]  # fmt: skip
WORLDS = (1, 1, 1, 2, 4, 6, 8, 12, 64, 1000, 2**20, 999_999_999)
NEAR = [
    *NUMBERS,
    2,
    3,
    4,
    5,
    6,
    8,
    12,
    16,
    64,
    100,
    1000,
    4096,
    10_000,
    10**6,
    10**9,
    10**12,
    1e-3,
    1e-8,
    0.9,
    1.0,
    2.0,
]


def prepare(folder: Path) -> Trial:
    """Damage recipes, and a configuration in which every key has a value; add odd words to the command line."""
    trees = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))]
    trees = [_without_files(tree) for tree in trees]
    trees += [trees[0], *[_full(folder)] * 2]
    keys = [*all_keys()]
    os.chdir(folder)
    file = folder / "config.yaml"

    def trial(chance: random.Random) -> Outcome:
        tree = chance.choice(trees)
        if chance.random() < 0.5:
            data, words = _plausible(chance, tree, keys)
        else:
            data, words = _text(chance, tree, keys), _words(chance, keys)
        file.write_bytes(data)
        return _dry_run(["--config", str(file), "--dry-run", *words])

    return trial


def _without_files(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe on synthetic documents, beginning from nothing."""
    data = {key: value for key, value in tree["data"].items() if key not in ("train", "valid", "tokenizer")}
    found = tree | {"data": data | {"synthetic": {"documents": 100, "mean_length": 50}}}
    found["model"] = tree.get("model", {}) | {"vocab_size": 256}
    found["checkpoint"] = {key: value for key, value in tree.get("checkpoint", {}).items() if key != "load"}
    return found


def _full(folder: Path) -> dict[str, Any]:
    """All keys, and lists with something in them."""
    with PairWriter(folder / "held-out", Vocabulary(256, 0, "ab" * 32, "sentencepiece", "t.model")) as writer:
        writer.add(np.arange(200), [50] * 4, 900)
        writer.finish()
    tree = yaml.safe_load(to_yaml(load_config(ROOT / "launch" / "recipes" / "debug.yaml", {})))
    tree["data"]["sequence_schedule"] = [{"steps": 10, "sequence_length": 128}]
    tree["training"]["batch_ramp"] = [{"steps": 10, "global_batch_size": 8}]
    tree["model"]["rope_local"] = {"theta": 5e5, "scaling": "yarn", "factor": 4.0, "original_length": 64}
    tree["model"]["layer_kinds"] = ["global", "local", "local", "global"]
    tree["evaluation"]["tasks"] = [
        {"task": "perplexity", "interval": 5, "options": {"data": [str(folder / "held-out")], "stride": 5}}
    ]
    tree["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1000}}
    return tree


def _plausible(chance: random.Random, tree: Any, keys: list[Key]) -> tuple[bytes, list[str]]:
    """Values of the right type, and a world and a batch that fit, so that more of it is looked at."""
    tree = copy.deepcopy(tree)
    for _ in range(few(chance)):
        key = chance.choice(keys)
        values: list[Any] = [*filter(None, key.allowed.split(", "))] if key.kind == "word" else []
        if "true" in key.kind:
            values = [True, False]
        if "integer" in key.kind or "number" in key.kind:
            values = [value for value in NEAR if value >= 0 and ("number" in key.kind or isinstance(value, int))]
        _set(tree, key.path, chance.choice([*values, None] if "null" in key.kind or not values else values), chance)
    parallel = tree.get("parallel") or {}
    sizes = [parallel.get(axis, 1) for axis in ("tp", "cp", "pp")]
    world = chance.choice(WORLDS)
    if chance.random() < 0.8 and all(type(size) is int and 0 < size < 1000 for size in sizes):
        replicas = chance.choice((1, 1, 2, 3, 8, 64))
        world = prod(sizes) * replicas
        tree.setdefault("training", {})["global_batch_size"] = replicas * chance.choice((1, 4, 8, 100))
    return _dump(tree).encode(), ["--world-size", str(world)]


def _text(chance: random.Random, tree: Any, keys: list[Key]) -> bytes:
    """The file: a damaged tree, damaged text, or odd YAML among sound lines."""
    kind = chance.random()
    if kind < 0.55:
        tree = damaged_tree(chance, tree, spelled=False)
        for _ in range(few(chance) if chance.random() < 0.5 else 0):
            value = chance.choice(NEAR) if chance.random() < 0.6 else odd_value(chance, spelled=False)
            _set(tree, chance.choice(keys).path, value, chance)
    text = _dump(tree, allow_unicode=chance.random() < 0.5)
    if 0.55 <= kind < 0.75:
        return damaged_bytes(chance, text.encode())
    if kind >= 0.75:
        for _ in range(few(chance)):
            lines = text.split("\n")
            at = chance.randrange(len(lines))
            line = chance.choice(ODD_YAML)
            key = chance.choice(
                (chance.choice(keys).path.split(".")[-1], re.sub(r"\W.*", "", lines[at].strip()) or "x")
            )
            odd = line % ((key,) * (line.count("%s")))
            indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
            lines[at : at + chance.randrange(2)] = [indent + part for part in odd.split("\n")]
            text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def _dump(tree: Any, **options: Any) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(tree, Dumper=dumper, sort_keys=False, **options)
    return text


def _set(tree: Any, path: str, value: Any, chance: random.Random) -> None:
    """Give the key at ``path`` a value, if there are sections to hold it."""
    *parents, last = path.replace("[]", "").split(".")
    for name in parents:
        tree = tree.setdefault(name, {}) if isinstance(tree, dict) else None
        tree = chance.choice(tree) if isinstance(tree, list) and tree else tree
    if isinstance(tree, dict):
        tree[last] = value


def _words(chance: random.Random, keys: list[Key]) -> list[str]:
    """Further words for the command line, most of them an override."""
    words: list[str] = []
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4))):
        key = chance.choice(keys).path
        key = key if chance.random() < 0.8 else damaged_bytes(chance, key.encode()).decode("latin-1")
        values = (
            chance.choice(NEAR),
            chance.choice(TEXTS),
            odd_value(chance, spelled=False),
            chance.choice(ODD_YAML)[4:],
        )
        value = str(chance.choice(values))
        words += [f"--{key}={value}"] if chance.random() < 0.3 else [f"--{key}", value]
    if chance.random() < 0.3:
        words += ["--world-size", str(chance.choice((*WORLDS, "0", "-1", "x", "", "1e3", "9" * 30)))]
    if chance.random() < 0.05:
        words.insert(chance.randrange(len(words) + 1), chance.choice((*TEXTS, "--", "--=", "-", "--a..b", "--.=1")))
    return words


def _dry_run(words: list[str]) -> Outcome:
    """pretrain_zebra.py itself."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        code = pretrain_zebra.main(words)
    if code:
        assert code == 2, f"exit code {code}"
        assert told.getvalue().startswith("error: "), told.getvalue()
        raise UserError(told.getvalue().removeprefix("error: ").removesuffix("\n"))
    assert "# parameters" in out.getvalue() or "usage" in out.getvalue()
    line = parse_words(words)
    config = load_config(line.config, line.overrides)
    again = Path("again.yaml")
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(again, {}) == config, "config.yaml of the run folder reads back otherwise"
    assert "torch" not in sys.modules or "pytest" in sys.modules, "a configuration was checked with torch imported"
    return "other"
