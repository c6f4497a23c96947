"""The loss of a data set: each target once, whatever ranks, micro-batches and ZeRO stage; by position as counted by hand."""

from typing import Any

import pytest
import torch

from megatron_zebra.data.batch import collate
from megatron_zebra.data.rows import OnePass
from megatron_zebra.data.synthetic import SyntheticSource
from megatron_zebra.evaluation.loss import Evaluated, evaluate, position_edges
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.training.build import build_model, build_training
from tests.training.cases import opened, small

ROWS = 7


def rows() -> OnePass:
    return OnePass(SyntheticSource(40, 30, 101, 5), 48, ROWS)


def evaluated(grid: Grid, stage: int, micro_batch_size: int, more: dict[str, Any]) -> Evaluated:
    axes = {f"parallel__{name}": getattr(grid, name).size for name in ("tp", "cp", "pp")}
    config = small(model__num_layers=4, optimizer__zero_stage=stage, **axes, **more)
    arch, _ = opened(config)
    trained = build_training(config, arch, grid)
    return evaluate(trained.runner, rows(), micro_batch_size, grid, trained.context)


def by_hand() -> tuple[float, list[float], list[int]]:
    """Dense logits row by row, one loss at a time: the sum, and by bin of 0, 16, 32, 48."""
    config = small(model__num_layers=4)
    arch, _ = opened(config)
    model = build_model(config, arch, torch.device("cpu"))
    losses, counts = [0.0] * 3, [0] * 3
    for number in range(ROWS):
        batch = collate([rows().read(number)])
        tokens, positions, segments, labels = batch.here("cpu").inputs
        with torch.no_grad():
            scores = torch.log_softmax(model(tokens, positions, segments).double(), -1)
        for place in range(48):
            if labels[place] != -100:
                losses[int(positions[place]) // 16] -= float(scores[place, labels[place]])
                counts[int(positions[place]) // 16] += 1
    return sum(losses), losses, counts


@pytest.mark.parametrize(
    ("stage", "world_size", "micro_batch_size", "axes", "more"),
    [
        (0, 1, 1, {}, {}),
        (1, 1, 4, {}, {}),
        (1, 2, 1, {}, {}),
        (3, 2, 3, {}, {}),
        (1, 4, 2, {"tp": 2, "cp": 2}, {}),
        (1, 2, 1, {"pp": 2}, {"parallel__pp_schedule": "zero_bubble"}),
        (1, 4, 2, {"pp": 2}, {}),
        (1, 4, 1, {"pp": 2, "cp": 2}, {"parallel__pp_schedule": "interleaved"}),
    ],
)
def test_each_target_once_by_position(
    run_distributed: Any,
    stage: int,
    world_size: int,
    micro_batch_size: int,
    axes: dict[str, int],
    more: dict[str, Any],
) -> None:
    """Seven rows: no world size and no micro-batch here divides them."""
    total, losses, counts = by_hand()
    results = run_distributed(evaluated, world_size, stage, micro_batch_size, more, **axes)
    assert all(result == results[0] for result in results)
    result = results[0]
    assert result.edges == [0, 16, 32, 48]
    assert result.bin_targets == counts
    assert result.targets == sum(counts)
    assert result.loss_sum == pytest.approx(total, abs=1e-3)
    assert result.bin_losses == pytest.approx(losses, abs=1e-3)
    assert result.loss == pytest.approx(total / sum(counts), abs=1e-6)
    assert result.by_position() == pytest.approx([s / n for s, n in zip(losses, counts)], abs=1e-5)


def test_bins() -> None:
    assert position_edges(2048) == [0, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert position_edges(100) == [0, 16, 32, 64, 100]
    assert position_edges(16) == [0, 16]
    assert position_edges(10) == [0, 10]
    assert Evaluated(3.0, 2, [0, 16, 20], [3.0, 0.0], [2, 0]).by_position() == [1.5, None]
