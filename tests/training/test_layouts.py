"""Every kind of parallelism, and any of them together, gives one process's losses, gradients and gradient norms."""

import functools
import json
from typing import Any

import numpy as np
import pytest

from megatron_zebra.data.batch import read_step
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import Trained, build_training
from megatron_zebra.training.schedule import learning_rate
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small
from tests.training.test_zero import Curve, assert_same, reference

STEPS = 10
Gradients = dict[str, np.ndarray]
BASE = {"optimizer__clip_grad": 0.5, "optimizer__learning_rate": 3e-3}

LAYOUTS: list[dict[str, int]] = [
    {"world": 2, "tp": 2},
    {"world": 2, "cp": 2},
    {"world": 3, "cp": 3},
    {"world": 2, "pp": 2},
    {"world": 4, "tp": 2, "cp": 2},
    {"world": 4, "tp": 2, "pp": 2},
    {"world": 4, "cp": 2, "pp": 2},
    {"world": 4, "tp": 2},
    {"world": 4, "cp": 2},
    {"world": 4, "pp": 2},
    {"world": 4, "pp": 4},
    {"world": 4, "cp": 4},
    {"world": 4, "tp": 4},
    {"world": 8, "tp": 2, "cp": 2, "pp": 2},
]


FEW = 4  # steps of what varies a layout


def trained_curve(
    grid: Grid, overrides: dict[str, Any], wanted: Gradients, steps: int = STEPS
) -> tuple[Curve, dict[str, list[float]]]:
    """(loss, norm) of each step by the code that trains; of this rank's part of each parameter's first gradient: its
    squared distance from ``wanted``, and its number of elements.
    """
    config = small(**BASE | overrides)
    arch, inputs = opened(config)
    trained = build_training(config, arch, grid)
    rows, micro = config.training.global_batch_size, config.training.micro_batch_size
    out, apart = [], {}
    for step in range(steps):
        batch = read_step(inputs.train, step, step * rows, rows, micro, grid.dp_rank, grid.dp_size)
        rate = learning_rate(config.optimizer, step, STEPS)
        outcome = train_step(trained, batch.micro_batches, rate, grid, 1, StepFlops(arch))
        out.append((outcome.loss, outcome.result.norm))
        if step == 0:
            apart = first_gradient(trained, wanted)
    return out, apart


def first_gradient(trained: Trained, wanted: Gradients) -> dict[str, list[float]]:
    """After one step the first moment is (1 - beta1) x the clipped gradient."""
    apart = {}
    for part in trained.optimizer.held():
        if part.holder[0] == 0 and part.holder[1] and "exp_avg" in part.tensors:
            where = tuple(slice(o, o + n) for o, n in zip(part.box.offsets, part.box.shape))
            own = wanted[part.name][where].reshape(-1)[part.start : part.start + part.numel]
            difference = part.tensors["exp_avg"].double().numpy() / 0.1 - own
            apart[part.name] = [float(np.square(difference).sum()), float(part.numel)]
    return apart


@functools.cache
def expected(settings: str) -> tuple[Curve, Gradients]:
    """Of one process, plain torch: (loss, norm) of each step, and the first clipped gradient of each trained parameter."""
    first: Gradients = {}
    return reference(BASE | json.loads(settings), first_gradient=first), first


def check(run_distributed: Any, layout: dict[str, int], steps: int = STEPS, **settings: Any) -> None:
    """Train under ``layout`` with ``settings`` and compare with one process."""
    axes = {name: layout.get(name, 1) for name in ("tp", "cp", "pp")}
    function = ("model__", "data__", "training__freeze", "training__lora")
    model = {name: value for name, value in settings.items() if name.startswith(function)}
    # A pipeline needs as many micro-batches as stages.
    model["training__global_batch_size"] = 8 if axes["pp"] > 1 else 4
    curve, gradients = expected(json.dumps(model, sort_keys=True))
    overrides = settings | model | {f"parallel__{name}": size for name, size in axes.items()}
    found = run_distributed(trained_curve, layout["world"], overrides, gradients, steps, **axes)
    for got, _ in found:
        assert_same(got, curve[:steps], 1e-5)
    for name, distance in distances(found, gradients).items():
        assert distance <= 1e-5, f"{name}: gradient {distance:.1e} away"


def distances(found: list[tuple[Curve, dict[str, list[float]]]], gradients: Gradients) -> dict[str, float]:
    """||difference|| / ||gradient|| of each parameter's first gradient, put together from what all ranks hold."""
    out = {}
    for name, gradient in gradients.items():
        parts = [apart[name] for _, apart in found if name in apart]
        assert sum(numel for _, numel in parts) == gradient.size, f"{name}: not every element once"
        # The first gradient of an adapter's A is zero, as its B is.
        out[name] = float(np.sqrt(sum(square for square, _ in parts)) / (np.linalg.norm(gradient) or 1.0))
    return out


def name_of(layout: dict[str, int]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in layout.items())


@pytest.mark.parametrize(("rows", "tied"), [(1, False), (2, True)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_P01_P07_L02_to_L05_N01_N02_V03_equal_to_one_process(
    run_distributed: Any, layout: dict[str, int], tied: bool, rows: int
) -> None:
    steps = FEW if tied else STEPS
    check(run_distributed, layout, steps, training__micro_batch_size=rows, model__tie_embeddings=tied)


# What else may be chosen, each under a layout that it touches.
CHOICES: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"world": 2, "pp": 2}, {"parallel__pp_schedule": "interleaved"}),
    ({"world": 2, "pp": 2}, {"parallel__pp_schedule": "zero_bubble", "model__tie_embeddings": True}),
    ({"world": 2, "pp": 2}, {"parallel__pp_schedule": "zero_bubble", "training__recompute": "full"}),
    ({"world": 2, "cp": 2}, {"training__offload_activations": True, "optimizer__offload": True}),
    ({"world": 2, "tp": 2}, {"training__offload_activations": True, "training__recompute": "full"}),
    ({"world": 2, "pp": 2}, {"parallel__pp_layers": [3, 1], "training__recompute": "full"}),
    ({"world": 4, "tp": 2, "pp": 2}, {"parallel__pp_schedule": "interleaved", "training__recompute": "attention"}),
    ({"world": 4, "tp": 2, "pp": 2}, {"parallel__pp_schedule": "zero_bubble", "model__qk_norm": True}),
    ({"world": 2, "tp": 2}, {"optimizer__zero_stage": 0, "model__qkv_bias": True, "model__qk_norm": True}),
    ({"world": 4, "tp": 4}, {"optimizer__zero_stage": 0, "model__qkv_bias": True, "model__qk_norm": True}),
    ({"world": 4, "tp": 4}, {"parallel__vocab_multiple": 32, "optimizer__zero_stage": 2}),
    ({"world": 4, "tp": 2}, {"optimizer__zero_stage": 3, "model__qkv_bias": True, "model__tie_embeddings": True}),
    ({"world": 4, "tp": 2, "cp": 2}, {"optimizer__zero_stage": 2, "training__recompute": "full"}),
    ({"world": 4, "cp": 2}, {"optimizer__zero_stage": 3, "parallel__cp_order": "contiguous"}),
    ({"world": 2, "tp": 2}, {"optimizer__zero_stage": 3, "training__recompute": "attention", "model__qk_norm": True}),
    ({"world": 2}, {"optimizer__zero_stage": 3, "training__recompute": "full", "training__offload_activations": True}),
    ({"world": 2, "pp": 2}, {"parallel__pp_schedule": "zero_bubble", "training__recompute": "attention"}),
    ({"world": 2, "cp": 2}, {"optimizer__zero_stage": 0, "parallel__cp_head_groups": 2}),
    ({"world": 3, "cp": 3}, {"parallel__cp_keep_fetched": True, "model__window_size": 30}),
    ({"world": 2, "cp": 2}, {"training__recompute": "attention", "training__offload_activations": True}),
    ({"world": 2, "cp": 2}, {"data__attend_across_documents": True}),
    ({"world": 2, "cp": 2}, {"parallel__cp_order": "contiguous", "model__window_size": 47}),
]
LORA = {"training__lora__rank": 3, "training__lora__alpha": 24.0}
ALL = {"training__lora__targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
FROZEN: list[tuple[dict[str, int], dict[str, Any]]] = [
    *(({"world": 2}, {"training__freeze": ["embedding", "mlp"], "optimizer__zero_stage": stage}) for stage in range(4)),
    ({"world": 2, "tp": 2}, {"training__freeze": ["attention", "head"], "training__recompute": "full"}),
    ({"world": 2, "cp": 2}, {"training__freeze": ["embedding", "norms", "mlp"], "model__qk_norm": True}),
    ({"world": 2, "pp": 2}, {"training__freeze": ["embedding", "norms"], "model__tie_embeddings": True}),
    ({"world": 2, "pp": 2}, {"training__freeze": ["mlp"], "model__tie_embeddings": True}),
    ({"world": 2, "pp": 2}, {"training__freeze": ["attention"], "parallel__pp_schedule": "zero_bubble"}),
    ({"world": 2, "tp": 2}, LORA | ALL | {"model__qkv_bias": True}),
    ({"world": 2, "cp": 2}, LORA | {"training__lora__targets": ["q_proj"], "optimizer__zero_stage": 2}),
    ({"world": 2, "pp": 2}, LORA | {"training__recompute": "full"}),
    ({"world": 2}, LORA | ALL | {"optimizer__zero_stage": 3, "training__lora__also_train": ["embedding", "norms"]}),
    ({"world": 4, "tp": 4}, LORA | ALL | {"optimizer__zero_stage": 0}),
]


def name_of_choice(choice: tuple[dict[str, int], dict[str, Any]]) -> str:
    return f"{name_of(choice[0])} " + " ".join(f"{key.rsplit('__')[-1]}={value}" for key, value in choice[1].items())


@pytest.mark.parametrize("choice", FROZEN, ids=name_of_choice)
def test_frozen_parts_and_adapters(run_distributed: Any, choice: tuple[dict[str, int], dict[str, Any]]) -> None:
    layout, settings = choice
    check(run_distributed, layout, steps=FEW, **settings)


@pytest.mark.parametrize("choice", CHOICES, ids=name_of_choice)
def test_choices_change_nothing(run_distributed: Any, choice: tuple[dict[str, int], dict[str, Any]]) -> None:
    layout, settings = choice
    check(run_distributed, layout, steps=FEW, **settings)
