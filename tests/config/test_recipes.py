"""The recipes of adaptation pass a dry run over the configuration of their model, without weights or data."""

import json
from pathlib import Path
from typing import Any

import pytest

import pretrain_zebra

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
# As the models' own config.json files have it.
MODELS: dict[str, dict[str, Any]] = {
    "adapt-llama2-7b-32k": LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "adapt-llama3-8b-128k": LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "adapt-llama3-8b-1m": LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "adapt-qwen3-8b-128k": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "adapt-smollm2-135m-12k": LLAMA
    | {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
# (processes, parameters, global layers, longest, what of RoPE changes)
EXPECTED = {
    "adapt-llama2-7b-32k": (8, "6,738,415,616", 8, 32768, "scaling linear"),
    "adapt-llama3-8b-128k": (16, "8,030,261,248", 8, 131072, "scaling llama3"),
    "adapt-llama3-8b-1m": (64, "8,030,261,248", 8, 1048576, "theta 200000000.0"),
    "adapt-qwen3-8b-128k": (16, "8,190,735,360", 9, 131072, "scaling yarn"),
    "adapt-smollm2-135m-12k": (2, "134,515,008", 10, 12288, "scaling yarn"),
}


def test_every_recipe_of_adaptation_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("adapt-*.yaml")} == set(MODELS) == set(EXPECTED)


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_passes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    processes, parameters, layers, longest, rope = EXPECTED[name]
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--checkpoint.load", str(tmp_path), "--data.train", "[]"]
    words += ["--data.synthetic.documents", "200", "--data.synthetic.mean_length", "100000"]
    words += ["--logging.run_dir", str(tmp_path / "run")]
    assert pretrain_zebra.main([*words, "--dry-run", "--world-size", str(processes)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f" {parameters}\n" in out
    assert f"█ {layers} global" in out
    assert f"max_length: {longest}, the loaded model has" in out
    assert f"rope of global layers: {rope}" in out
    total = next(line.split() for line in out.split("# memory")[1].splitlines() if line.startswith("  total"))
    assert float(total[1]) < 76, "GiB of a GPU of 80 GB"
    assert total[2] == "GiB"
