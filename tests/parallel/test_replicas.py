"""One turned bit of one weight on one rank is found and named, wherever others hold the same; without it nothing is."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.replicas import differing
from megatron_zebra.training import loop
from megatron_zebra.training.build import build_training
from tests.training.cases import opened, small
from tests.training.runs import Seen, run

QUICK = {"model__num_layers": 2, "training__global_batch_size": 4, "training__steps": 5}


def turned(module: torch.nn.Module, name: str) -> None:
    """The lowest bit of the last element."""
    param: Any = next(param for _, param in module.named_parameters() if param.full_name == name)  # type: ignore[attr-defined]
    values = getattr(param, "ds_tensor", param).detach()
    bits = values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).view(-1)
    bits[-1] ^= 1


def found(grid: Grid, overrides: dict[str, Any], rank: int, name: str) -> tuple[str | None, str | None]:
    config = small(**overrides)
    arch, _ = opened(config)
    module = build_training(config, arch, grid).optimizer.module
    before = differing(module, grid)
    if grid.rank == rank:
        turned(module, name)
    return before, differing(module, grid)


NORM, MATRIX = "layers.1.attention_norm.weight", "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_turned_bit_among_data_parallel_ranks(run_distributed: Any, stage: int, precision: str) -> None:
    settings = QUICK | {"optimizer__zero_stage": stage, "training__precision": precision}
    for before, after in run_distributed(found, 3, settings, 1, MATRIX):
        assert before is None
        assert after == f"{MATRIX} on rank 1 is not what rank 0, 2 has"


@pytest.mark.parametrize("stage", [1, 3])
def test_what_tensor_parallelism_does_not_divide(run_distributed: Any, stage: int) -> None:
    settings = QUICK | {"parallel__tp": 2, "optimizer__zero_stage": stage}
    outcomes = run_distributed(found, 4, settings, 3, NORM, tp=2)
    assert all(before is None for before, _ in outcomes)
    named = [after for _, after in outcomes if after]
    assert named
    assert all(after.startswith(f"{NORM} on rank ") for after in named)
    assert outcomes[2][1] is not None  # the tp rank beside it holds the same, under any stage
    # A divided matrix is other on each tp rank, and nobody else's under stage 3.
    for _, after in run_distributed(found, 2, settings, 1, MATRIX, tp=2):
        assert after is None


def flipping(grid: Grid, folder: Path, overrides: dict[str, Any]) -> Seen:
    real = loop.differing

    def spoiled(module: torch.nn.Module, grid: Grid) -> str | None:
        spoiled.calls += 1  # type: ignore[attr-defined]
        if spoiled.calls == 2 and grid.rank == 1:  # type: ignore[attr-defined]
            turned(module, NORM)
        return real(module, grid)

    spoiled.calls = 0  # type: ignore[attr-defined]
    with patch.object(loop, "differing", spoiled):
        return run(grid, folder, overrides)


def test_a_run_stops_and_says_which_checkpoints_are_in_doubt(run_distributed: Any, tmp_path: Path) -> None:
    settings = QUICK | {"training__compare_replicas": 2}
    for seen in run_distributed(flipping, 2, tmp_path, settings):
        assert seen.error is not None
        assert seen.error.startswith(f"step 4: {NORM} on rank ")
        assert "checkpoints after step 2 may have it" in seen.error
        assert len(seen.applied) == 4
