"""What is frozen has no optimizer state and stays as it was, in whole checkpoints that resume and reshape."""

from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.checkpoint.catalog import newest
from megatron_zebra.checkpoint.reader import open_checkpoint
from megatron_zebra.config.sections import Training
from megatron_zebra.model.lora import from_metadata
from megatron_zebra.model.trained import is_trained
from megatron_zebra.planning.parameters import held_parameters, parameter_count, trained_count
from megatron_zebra.planning.stages import Stages
from tests.training.cases import opened, small
from tests.training.runs import contents, curve, metrics, run

QUICK = {
    "model__num_layers": 2,
    "model__tie_embeddings": True,
    "training__global_batch_size": 4,
    "training__steps": 4,
    "checkpoint__interval": 2,
    "checkpoint__keep_last": 9,
}
FREEZE = QUICK | {"training__freeze": ["embedding", "mlp"]}
LORA = QUICK | {"training__lora__rank": 2, "training__lora__targets": ["q_proj", "k_proj", "down_proj"]}


def checkpoint_of(folder: Path, step: int | None = None) -> Any:
    place = newest(folder / "checkpoints") if step is None else folder / "checkpoints" / f"step-{step:08d}"
    assert place is not None
    return open_checkpoint(place)


@pytest.mark.parametrize(
    ("settings", "world", "axes", "stage", "precision"),
    [
        (FREEZE, 2, {}, 0, "bf16"),
        (FREEZE, 2, {}, 1, "bf16"),
        (FREEZE, 2, {"pp": 2}, 1, "fp32"),
        (FREEZE, 2, {}, 2, "fp32"),
        (LORA, 2, {}, 3, "bf16"),
        (LORA, 2, {"tp": 2}, 2, "bf16"),
    ],
)
def test_frozen_weights_stay_and_the_run_resumes_bit_for_bit(
    run_distributed: Any,
    tmp_path: Path,
    settings: dict[str, Any],
    world: int,
    axes: dict[str, int],
    stage: int,
    precision: str,
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = settings | {"optimizer__zero_stage": stage, "training__precision": precision}
    settings |= {f"parallel__{name}": size for name, size in axes.items()}
    run_distributed(run, world, whole, settings, **axes)
    run_distributed(run, world, resumed, settings, 4, **axes)
    run_distributed(run, world, resumed, settings, **axes)
    assert curve(resumed) == curve(whole)
    assert contents(resumed) == contents(whole)

    config = small(**settings)
    shapes = opened(config)[0].parameter_shapes()
    early, late = checkpoint_of(whole, 2), checkpoint_of(whole, 4)
    assert set(late.names()) >= set(shapes)
    moved = {name for name in late.names() if early.read(name).tobytes() != late.read(name).tobytes()}
    assert moved == {name for name in late.names() if is_trained(name, config.training)} == set(late.names("exp_avg"))


@pytest.mark.parametrize("settings", [FREEZE, LORA])
def test_another_layout_goes_on(run_distributed: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    first = settings | {"parallel__tp": 2, "parallel__pp": 2}
    run_distributed(run, 4, whole, first, tp=2, pp=2)
    run_distributed(run, 4, changed, first, 4, tp=2, pp=2)
    run_distributed(run, 2, changed, settings | {"optimizer__zero_stage": 3})
    for got, want in zip(metrics(changed), metrics(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_what_was_frozen_has_no_moments_to_go_on_with(run_distributed: Any, tmp_path: Path) -> None:
    run_distributed(run, 1, tmp_path, FREEZE, 4)
    (seen,) = run_distributed(run, 1, tmp_path, QUICK)
    assert seen.error is not None
    assert seen.error.startswith("training.freeze: embedding.weight was frozen in ")
    (seen,) = run_distributed(run, 1, tmp_path, LORA)
    assert seen.error is not None
    assert "training.lora: adapters of rank 2 and alpha 16 on down_proj, k_proj, q_proj, " in seen.error
    assert "has no adapters" in seen.error
    (seen,) = run_distributed(run, 1, tmp_path, FREEZE | {"training__freeze": ["embedding", "mlp", "norms"]})
    assert seen.error is None  # more may be frozen


def test_adapters_are_merged_where_a_run_begins_without_them(run_distributed: Any, tmp_path: Path) -> None:
    """A step of length zero leaves the loss as the adapters had it."""
    adapted, plain, same = (tmp_path / name for name in ("adapted", "plain", "same"))
    run_distributed(run, 1, adapted, LORA | {"training__lora__alpha": 200.0})
    still = {"optimizer__learning_rate": 1e-30, "training__steps": 1}
    load = {"checkpoint__load": str(adapted), "checkpoint__load_part": "weights"}
    run_distributed(run, 1, plain, QUICK | load | still)
    run_distributed(run, 2, same, LORA | {"training__lora__alpha": 200.0} | load | still)
    losses = [metrics(folder)[0]["loss"] for folder in (plain, same)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < metrics(adapted)[0]["loss"] - 0.01
    assert not from_metadata(checkpoint_of(plain).metadata, plain).rank
    assert from_metadata(checkpoint_of(same).metadata, same).alpha == 200.0


def test_counts_of_parameters() -> None:
    config = small(**QUICK)
    arch, _ = opened(config)
    total = parameter_count(arch)
    assert trained_count(arch, config.training) == total
    mlp = 2 * 3 * 32 * 48
    assert trained_count(arch, Training(freeze=["mlp"])) == total - mlp
    adapted = small(**LORA).training
    assert trained_count(arch, adapted) == 2 * 2 * ((32 + 32) + (32 + 16) + (48 + 32))
    held = held_parameters(arch, config.parallel, Stages.whole(2), 0, adapted)
    assert held == (total + trained_count(arch, adapted), trained_count(arch, adapted))
