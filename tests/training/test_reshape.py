"""A checkpoint of any layout goes on under any other: every bit of weights and moments, then the same losses."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.build import build_training
from megatron_zebra.training.state import resume_state, save_state
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
    progress, _ = resume_state(source / "checkpoints", config, arch, trained.optimizer, collective)
    assert progress is not None
    save_state(target / "checkpoints", progress, config, arch, trained.optimizer, collective)


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
    for got, want in zip(records, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
