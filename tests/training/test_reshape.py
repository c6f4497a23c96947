"""A checkpoint of any layout goes on under any other: every bit of weights and moments, then the same losses."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.checkpoint.catalog import newest
from megatron_zebra.checkpoint.reader import open_checkpoint
from megatron_zebra.checkpoint.verify import find_latest_good
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import KINDS
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.build import build_training
from megatron_zebra.training.state import Progress, restore, resume_state, state_of
from tests.training.cases import opened, small
from tests.training.runs import contents, metrics, run

SAVED = {"tp": 2, "pp": 2}  # on four processes
RUN = {
    "training__global_batch_size": 4,
    "training__steps": 10,
    "checkpoint__interval": 5,
    "checkpoint__keep_last": 9,
    "optimizer__learning_rate": 3e-3,
    "model__tie_embeddings": True,
    "model__qkv_bias": True,
}
OTHERS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (1, {}, {"optimizer__zero_stage": 0}),
    (4, {}, {"optimizer__zero_stage": 3}),
    (4, {"cp": 4}, {"optimizer__zero_stage": 2}),
    (4, {"tp": 4}, {"optimizer__zero_stage": 0, "parallel__vocab_multiple": 16}),
    (4, {"pp": 4}, {}),
]


def settings(axes: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    return RUN | {f"parallel__{name}": size for name, size in axes.items()} | more


def again(grid: Grid, source: Path, target: Path, overrides: dict[str, Any]) -> None:
    """Load the newest checkpoint of ``source`` and save it in ``target``."""
    config = small(**overrides)
    arch, _ = opened(config)
    trained, collective = build_training(config, arch, grid), WorldCollective(grid)
    root = source / "checkpoints"
    found = find_latest_good(root, collective)
    progress = resume_state(root, found, config, arch, trained.optimizer, collective)
    assert progress is not None
    state_of(progress, config, arch, trained.optimizer).save(target / "checkpoints", config.checkpoint, collective)


@pytest.fixture(scope="module")
def runs(run_distributed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run, and one that ended after the checkpoint of its fifth step."""
    whole, halved = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("halved")
    run_distributed(run, 4, whole, settings(SAVED, {}), **SAVED)
    run_distributed(run, 4, halved, settings(SAVED, {}), 6, **SAVED)
    return whole, halved


@pytest.mark.parametrize(("world", "axes", "more"), OTHERS)
def test_R08_every_layout_loads_every_bit_and_goes_on(
    run_distributed: Any,
    runs: tuple[Path, Path],
    tmp_path: Path,
    world: int,
    axes: dict[str, int],
    more: dict[str, Any],
) -> None:
    whole, halved = runs
    there, back = tmp_path / "there", tmp_path / "back"
    run_distributed(again, world, halved, there, settings(axes, more), **axes)
    assert contents(there) == contents(halved)
    run_distributed(again, 4, there, back, settings(SAVED, {}), **SAVED)
    assert contents(back) == contents(halved)

    resumed = tmp_path / "resumed"
    shutil.copytree(halved, resumed)
    run_distributed(run, world, resumed, settings(axes, more), **axes)
    records, expected = metrics(resumed), metrics(whole)
    assert [record["consumed_rows"] for record in records] == [record["consumed_rows"] for record in expected]
    # Each token once, however many ranks share its row.
    tokens = [record["consumed_rows"] * record["sequence_length"] for record in records]
    assert [record["consumed_tokens"] for record in records] == tokens
    assert [record["consumed_tokens"] for record in expected] == tokens
    for got, want in zip(records, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


# Tensors of many checksummed blocks of 128 KiB, which are the least that is read.
WIDE = {
    "model__hidden_size": 256,
    "model__num_layers": 4,
    "model__num_heads": 8,
    "model__num_kv_heads": 4,
    "model__ffn_hidden_size": 1024,
    "model__vocab_size": 2048,
    "training__global_batch_size": 4,
}


def save_wide(grid: Grid, folder: Path, overrides: dict[str, Any]) -> None:
    config = small(**overrides)
    arch, _ = opened(config)
    optimizer = build_training(config, arch, grid).optimizer
    state_of(Progress(), config, arch, optimizer).save(folder, config.checkpoint, WorldCollective(grid))


def read_wide(grid: Grid, folder: Path, overrides: dict[str, Any]) -> float:
    """Bytes that this rank reads of the checkpoint, over the bytes that it holds."""
    config = small(**overrides)
    arch, _ = opened(config)
    optimizer = build_training(config, arch, grid).optimizer
    place = newest(folder)
    assert place is not None
    checkpoint = open_checkpoint(place)
    restore(checkpoint, config, arch, optimizer)
    return checkpoint.bytes_read / sum(4 * len(KINDS) * part.numel for part in optimizer.held())


@pytest.fixture(scope="module")
def wide(run_distributed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    run_distributed(save_wide, 4, folder, WIDE | settings(SAVED, {}), **SAVED)
    return folder


# What a rank reads more than it holds: where tp grows from two to four, o_proj and down_proj are cut across their rows, and
# read whole rows at a time.
READ: list[tuple[int, dict[str, int], dict[str, Any], float]] = [
    (4, {}, {}, 1.01),
    (4, {}, {"optimizer__zero_stage": 3}, 1.3),  # every tensor in four: blocks at the ends of small shards
    (4, {"cp": 4}, {"optimizer__zero_stage": 2}, 1.01),
    (4, {"pp": 4}, {}, 1.0),
    (4, {"tp": 2, "pp": 2}, {}, 1.0),
    (4, {"tp": 2, "cp": 2}, {}, 1.01),
    (4, {"tp": 4}, {}, 1.42),
]


@pytest.mark.parametrize(("world", "axes", "more", "most"), READ)
def test_a_rank_reads_about_its_share(
    run_distributed: Any, wide: Path, world: int, axes: dict[str, int], more: dict[str, Any], most: float
) -> None:
    found = run_distributed(read_wide, world, wide, WIDE | settings(axes, more), **axes)
    assert min(found) >= 1
    assert max(found) <= most
