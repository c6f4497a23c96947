"""Every RoPE method against transformers beyond the original length, read and written in both forms."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.to_hf import to_hf
from tests.convert.models import again, ids, make, ours, theirs

ORIGINAL = 16
LENGTH = 4 * ORIGINAL
METHODS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-all": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_V06_V07_scaling_is_applied_and_carried_out_again(method: str, tmp_path: Path) -> None:
    longest = ORIGINAL if method == "dynamic" else LENGTH
    model = make(tmp_path / "hf", "Llama", rope_parameters=METHODS[method], max_position_embeddings=longest)
    expected = theirs(model, ids(LENGTH))  # one pass of this length on a fresh model: what dynamic NTK is frozen for
    assert (ours(tmp_path / "hf", ids(LENGTH)) - expected).abs().max() < 1e-4
    from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    for host in ("llama", "cwm"):
        to_hf(tmp_path / "checkpoint", tmp_path / host, form=host)
        assert (theirs(again(tmp_path / host), ids(LENGTH)) - expected).abs().max() < 1e-4
        config = json.loads((tmp_path / host / "config.json").read_text())
        assert config["max_position_embeddings"] == LENGTH
        original = METHODS[method].get("original_max_position_embeddings")
        assert config["rope_parameters"].get("original_max_position_embeddings") == original
    unscaled = make(
        tmp_path / "plain", "Llama", rope_parameters={**METHODS["default"], "rope_theta": METHODS[method]["rope_theta"]}
    )
    if method != "default":
        assert (theirs(unscaled, ids(LENGTH)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "yarn-all"])
def test_the_form_of_transformers_4_means_the_same(method: str, tmp_path: Path) -> None:
    longest = ORIGINAL if method == "dynamic" else LENGTH
    make(tmp_path / "hf", "Llama", rope_parameters=METHODS[method], max_position_embeddings=longest)
    new = architecture_of(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    said = config.pop("rope_parameters")
    config["rope_theta"] = said.pop("rope_theta")
    kind = said.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **said}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert architecture_of(tmp_path / "hf") == new
    assert (theirs(again(tmp_path / "hf"), ids(LENGTH)) - ours(tmp_path / "hf", ids(LENGTH))).abs().max() < 1e-4


def test_W11_theta_counts_with_and_without_scaling(tmp_path: Path) -> None:
    found = []
    for scaling in (None, {"type": "linear", "factor": 2.0}):
        make(tmp_path / "hf", "Llama")
        config = json.loads((tmp_path / "hf/config.json").read_text())
        del config["rope_parameters"]
        config |= {"rope_theta": 12345.0, "rope_scaling": scaling, "self_attn_type": "full"}
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
        found.append(architecture_of(tmp_path / "hf").rope["global"].theta)
    assert found == [12345.0, 12345.0]


def test_V10_the_original_length_is_a_field_of_its_own(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    model = make(tmp_path / "hf", "Llama", rope_parameters=yarn, max_position_embeddings=64)
    from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    arch = architecture_of(tmp_path / "out")
    assert (arch.rope["global"].original_length, arch.max_length) == (16, 64)
    assert (theirs(again(tmp_path / "out"), ids(128)) - theirs(model, ids(128))).abs().max() < 1e-4


def test_dynamic_ntk_is_frozen_for_a_length_and_so_a_plain_theta_to_others(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama", rope_parameters=METHODS["dynamic"], max_position_embeddings=ORIGINAL)
    from_hf(tmp_path / "hf", tmp_path / "checkpoint", rope_length=2 * ORIGINAL)
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    dim = config["head_dim"]
    assert config["rope_parameters"]["rope_type"] == "default"
    assert math.isclose(config["rope_parameters"]["rope_theta"], 2e4 * (4 * 2 - 3) ** (dim / (dim - 2)))
    assert config["max_position_embeddings"] == 2 * ORIGINAL
    tokens = ids(2 * ORIGINAL)
    assert (theirs(again(tmp_path / "hf"), tokens) - theirs(again(tmp_path / "out"), tokens)).abs().max() < 1e-4
