"""Tiny twins of the recipes: the same file with overrides that shrink it, trained for a few steps on one CPU process.

    python -m tests.launching.twins FOLDER RECIPE ...

Lengths, windows and documents shrink together, so that a twin has the phases, sources and RoPE of its recipe.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import pretrain_zebra
from megatron_zebra.data.writer import PairWriter, Vocabulary

ROOT = Path(__file__).resolve().parents[2]
LENGTH, VOCABULARY = 192, 104


def overrides(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What makes ``recipe`` tiny; its data are those that ``prepare`` writes, its model the one of ``checkpoint``."""
    model, data, parallel = recipe.get("model", {}), recipe["data"], recipe.get("parallel", {})

    def small(tokens: int) -> int:
        return max(4, tokens * LENGTH // data["sequence_length"])

    phases = [{"steps": 1, "sequence_length": small(p["sequence_length"])} for p in data.get("sequence_schedule", [])]
    steps = len(phases) + 2
    changed: dict[str, Any] = {
        "data.sequence_length": LENGTH,
        "data.sequence_schedule": phases,
        "data.train": [_source(source, folder, small) for source in data["train"]],
        "data.valid": [str(folder / "texts")],
        "data.tokenizer": None,
        "training.steps": steps,
        "training.global_batch_size": 2,
        "optimizer.warmup_steps": 1,
        "checkpoint.interval": steps,
        "evaluation.interval": steps,
        "evaluation.rows": 2,
        "logging.run_dir": str(folder / "run"),
        "parallel.device": "cpu",
    }
    changed |= {f"parallel.{axis}": 1 for axis in ("tp", "cp", "pp", "cp_head_groups") if axis in parallel}
    changed |= {f"model.{name}": value for name, value in _sizes(model).items() if name in model}
    if "window_size" in model:
        changed["model.window_size"] = small(model["window_size"])
    if "max_length" in model:
        changed["model.max_length"] = small(model["max_length"])
    if "original_length" in model.get("rope", {}):
        changed["model.rope.original_length"] = small(model["rope"]["original_length"])
    if "checkpoint" in recipe and "load_part" in recipe["checkpoint"]:
        changed["checkpoint.load"] = str(folder / "loaded")
    return changed


def prepare(recipe: dict[str, Any], folder: Path) -> None:
    """Texts, conversations, and the model to begin from if ``recipe`` loads one."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lengths = [LENGTH // 8, LENGTH // 4, LENGTH // 2, LENGTH - 1] * 12
    for name in ("texts", "chats"):
        tokens = random.integers(0, VOCABULARY - 1, sum(lengths)).astype(np.uint16)
        with PairWriter(folder / name, Vocabulary(VOCABULARY, 0, "", "", ""), masked=name == "chats") as writer:
            mask = (np.arange(tokens.size) % 3 > 0).astype(np.uint8) if name == "chats" else None
            writer.add(tokens, lengths, mask=mask)
            writer.finish()
    if "load_part" in recipe.get("checkpoint", {}):
        _save_model(recipe.get("model", {}), folder / "loaded")


def _save_model(model: dict[str, Any], folder: Path) -> None:
    """A Hugging Face folder as the recipe's own would be, of the sizes of its twin."""
    import transformers

    kind = "Qwen3" if model.get("qk_norm") else "Llama"
    sizes = _sizes(model)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_heads"],
        intermediate_size=sizes["ffn_hidden_size"],
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH // 8,
        tie_word_embeddings=model.get("tie_embeddings", True),
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)


def _sizes(model: dict[str, Any]) -> dict[str, int]:
    groups = model.get("num_heads", 4) // model.get("num_kv_heads", 4)
    return {
        "hidden_size": 64,
        "num_layers": model.get("layer_group_size", 2),
        "num_heads": 4,
        "num_kv_heads": max(1, 4 // groups),
        "head_dim": 16,
        "ffn_hidden_size": 128,
        "vocab_size": VOCABULARY,
    }


def _source(source: str | dict[str, Any], folder: Path, small: Any) -> dict[str, Any]:
    given = {"prefix": source} if isinstance(source, str) else dict(source)
    chat = any(word in given["prefix"] for word in ("qa", "chat"))
    given["name"] = given.get("name", Path(given["prefix"]).name)
    given["prefix"] = str(folder / ("chats" if chat else "texts"))
    if "min_document_tokens" in given:
        given["min_document_tokens"] = small(given["min_document_tokens"])
    return given


def main(folder: Path, recipes: list[str]) -> None:
    """Train every twin; FOLDER/NAME/code has its exit code, FOLDER/NAME/output what it printed."""
    from megatron_zebra.training import loop

    loop.write_plots = lambda _: []  # a third of the time, and no part of a recipe
    for name in recipes:
        file = ROOT / "launch" / "recipes" / f"{name}.yaml"
        recipe = yaml.safe_load(file.read_text())
        prepare(recipe, folder / name)
        words = [w for key, value in overrides(recipe, folder / name).items() for w in (f"--{key}", json.dumps(value))]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pretrain_zebra.main(["--config", str(file), *words])
        (folder / name / "output").write_text(said.getvalue())
        (folder / name / "code").write_text(str(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
