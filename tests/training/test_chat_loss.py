"""Training on conversations: the loss is that of the assistant's tokens alone, computed by hand, under any layout and packing."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_zebra.attention.contract import Segments
from megatron_zebra.data.batch import read_step
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import build_model, build_training
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small

ROWS = 4


def conversations(prefix: Path, seed: int, masked: bool) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A pair of ragged documents of which the last third of each is said by the assistant; tokens, mask and bounds."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, 40, 60)
    tokens = generator.integers(1, 101, lengths.sum())
    mask = np.concatenate([np.arange(n) >= n - n // 3 for n in lengths]).astype(np.uint8)
    with PairWriter(prefix, Vocabulary(101, 0, "", "", ""), masked=masked) as writer:
        writer.add(tokens, lengths, mask=mask if masked else None)
        writer.finish()
    return str(prefix), tokens, mask if masked else np.ones_like(mask), np.cumsum([0, *lengths])


def first_step(grid: Grid, overrides: dict[str, Any]) -> tuple[float, int, float]:
    """(loss, targets, gradient norm) of the first step, by the code that trains."""
    config = small(**overrides)
    arch, inputs = opened(config)
    trained = build_training(config, arch, grid)
    micro = config.training.micro_batch_size
    batch = read_step(inputs.train, 0, 0, ROWS, micro, grid.dp_rank, grid.dp_size)
    outcome = train_step(trained, batch.micro_batches, 1e-3, grid, 2, StepFlops(arch))
    return outcome.loss, outcome.targets, outcome.result.norm


def by_hand(
    overrides: dict[str, Any], made: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[float, int, float]:
    """The same with each document's part alone, full logits, and labels of -100 wherever the assistant does not speak."""
    config = small(**overrides)
    arch, inputs = opened(config)
    model = build_model(config, arch, torch.device("cpu"))
    total, targets = torch.zeros(()), 0
    for row in range(ROWS):
        _, tokens, mask, bounds = made[inputs.train.locate(row).source]
        for start, stop in inputs.train.spans(row):
            cuts = [start, *(int(b) for b in bounds if start < b < stop), stop]
            for first, last in pairwise(cuts):
                labels = np.full(last - first, -100)
                for place in range(first, last):
                    if place + 1 < len(tokens) and place + 1 not in bounds and mask[place + 1]:
                        labels[place - first] = tokens[place + 1]
                part = torch.from_numpy(tokens[first:last])
                logits = model(part, torch.arange(len(part)), Segments.from_lengths([len(part)]))
                total = total + F.cross_entropy(logits, torch.from_numpy(labels), ignore_index=-100, reduction="sum")
                targets += int((labels != -100).sum())
    (total / targets).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return float(total.detach() / targets), targets, float(norm)


CASES = [
    ({"world": 1}, "best_fit", {}),
    ({"world": 1}, "concat", {"training__micro_batch_size": 2}),
    ({"world": 2}, "best_fit", {"training__micro_batch_size": 2}),
    ({"world": 2, "cp": 2}, "best_fit", {"optimizer__zero_stage": 2}),
    ({"world": 2, "cp": 2}, "concat", {}),
]


@pytest.mark.parametrize(("layout", "packing", "more"), CASES)
def test_S01_only_the_assistants_tokens_train(
    run_distributed: Any, tmp_path: Path, layout: dict[str, int], packing: str, more: dict[str, Any]
) -> None:
    chat, web = conversations(tmp_path / "chat", 1, masked=True), conversations(tmp_path / "web", 2, masked=False)
    settings = {
        "data__synthetic__documents": 0,
        "data__train": [chat[0], web[0]],
        "data__split": [1.0, 0.0, 0.0],
        "data__packing": packing,
        "training__global_batch_size": ROWS,
        **more,
    }
    loss, targets, norm = by_hand(settings, [chat, web])
    assert 0 < targets < 0.8 * ROWS * 48
    axes = {name: size for name, size in layout.items() if name != "world"}
    overrides = settings | {f"parallel__{name}": size for name, size in axes.items()}
    for got, count, size in run_distributed(first_step, layout["world"], overrides, **axes):
        assert count == targets
        assert got == pytest.approx(loss, abs=1e-5)
        assert size == pytest.approx(norm, rel=1e-5)
