"""Run folders made by hand, as training writes them."""

import json
from pathlib import Path
from typing import Any

from megatron_zebra.config.load import load_config, to_yaml

EDGES = [0, 16, 32, 64]
TABLE = {"lengths": [1024, 4096], "depth_edges": [0.0, 0.5, 1.0], "exact": [[1.0, 0.5], [None, 0.25]]}


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 8.0 / step,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3 / step,
        "tokens_per_second": 5e3 + step,
        "consumed_tokens": step * 10,
        "skipped_steps": 0,
        "mfu": None,
    } | more


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in records))


def run_folder(folder: Path, steps: int = 30, settings: dict[str, Any] | None = None, world_size: int = 1) -> Path:
    """A run that was never evaluated nor saved."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        to_yaml(load_config(None, {"model.window_size": 64, "data.train": ["text"]} | (settings or {})))
    )
    (folder / "environment.json").write_text(json.dumps({"world_size": world_size, "vocab_size": 300, "host": "x"}))
    write_lines(folder / "metrics.jsonl", [record(step) for step in range(1, steps + 1)])
    return folder


def evaluate(folder: Path) -> None:
    """Two evaluations in training, and what tools/evaluate.py writes afterwards."""
    losses = {10: [3.0, 2.9, None], 20: [2.5, 2.4, 2.3]}
    lines = [
        {"step": step, "sets": {"held": {"loss": 2.5, "edges": EDGES, "loss_by_position": of_step}}}
        for step, of_step in losses.items()
    ]
    write_lines(folder / "evaluation.jsonl", lines)
    (folder / "evaluation").mkdir()
    documents = {
        "perplexity": {"sets": {"held": {"edges": EDGES, "loss_by_position": [2.4, 2.2, 2.1]}}},
        "answers": {"checkpoint": "x", **TABLE},
        "retrieval": {"checkpoint": "x", "tasks": {"passkey": TABLE, "needle": TABLE}},
    }
    for name, document in documents.items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(document))


def save(folder: Path, step: int, size: int, complete: bool = True) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "data").write_bytes(bytes(size - 2 * complete))
    if complete:
        (checkpoint / "index.json").write_text("{}")
