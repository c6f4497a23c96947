"""A converted model through the layouts of training and out again."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.to_hf import to_hf
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.build import build_training
from megatron_zebra.training.state import Progress, restore_weights, state_of
from tests.convert.models import again, ids, make, ours, stored, theirs
from tests.training.cases import small
from tests.training.runs import run

AXES = {"tp": 2, "pp": 2}
DIVIDED = {"parallel__tp": 2, "parallel__pp": 2, "parallel__vocab_multiple": 128}


def through(grid: Grid, source: Path, target: Path) -> None:
    """Load the weights as this layout divides them, and save them from there."""
    config = small(**DIVIDED)
    opened = open_model(source)
    arch = opened.architecture
    optimizer = build_training(config, arch, grid).optimizer
    restore_weights(opened, arch, optimizer)
    state_of(Progress(), config, arch, optimizer).save(target, config.checkpoint, WorldCollective(grid))


def test_V01_V02_through_tp2_pp2_and_out_bit_for_bit(run_distributed: Any, tmp_path: Path) -> None:
    make(tmp_path / "hf", "Qwen2", tie_word_embeddings=True, vocab_size=101)
    from_hf(tmp_path / "hf", tmp_path / "checkpoint", layer_group_size=2, window_size=5)
    before = stored(tmp_path / "hf")
    for origin in ("hf", "checkpoint"):
        run_distributed(through, 4, tmp_path / origin, tmp_path / f"from-{origin}", **AXES)
        to_hf(tmp_path / f"from-{origin}", tmp_path / f"out-{origin}")
        after = stored(tmp_path / f"out-{origin}")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_V04_a_padded_vocabulary_goes_out_without_its_padding(run_distributed: Any, tmp_path: Path) -> None:
    """Import, train a step under tp2 pp2 with rows padded to 128, export: 101 rows, and the RoPE of the recipe."""
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 24}
    make(tmp_path / "hf", "Llama", vocab_size=101, max_position_embeddings=48, rope_parameters=yarn)
    from_hf(tmp_path / "hf", tmp_path / "checkpoint", layer_group_size=2, window_size=7)
    rope = {"theta": 5e5, "scaling": "yarn", "factor": 2.0, "original_length": 24}
    like = {
        "hidden_size": 32,
        "num_layers": 5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_hidden_size": 48,
        "norm_eps": 1e-6,
        "rope": rope,
    }
    settings = DIVIDED | {f"model__{key}": value for key, value in like.items()}
    settings |= {
        "training__steps": 1,
        "checkpoint__load": str(tmp_path / "checkpoint"),
        "checkpoint__load_part": "weights",
    }
    seen = run_distributed(run, 4, tmp_path / "run", settings, **AXES)
    assert [rank.error for rank in seen] == [None] * 4
    to_hf(tmp_path / "run", tmp_path / "out")
    assert stored(tmp_path / "out")["lm_head.weight"].shape == (101, 32)
    assert not torch.equal(stored(tmp_path / "out")["lm_head.weight"], stored(tmp_path / "hf")["lm_head.weight"])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_parameters"]["original_max_position_embeddings"] == 24
    assert (written["vocab_size"], written["max_position_embeddings"]) == (101, 48)
    assert (theirs(again(tmp_path / "out"), ids()) - ours(tmp_path / "run", ids())).abs().max() < 1e-4
