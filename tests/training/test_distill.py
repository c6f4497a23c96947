"""A teacher is heard alike under every layout: losses, divergences, gradients and norms of one process."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_zebra.data.batch import read_step
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import build_model, build_training
from megatron_zebra.training.schedule import learning_rate
from megatron_zebra.training.step import train_step
from tests.convert.models import make, ours
from tests.model.test_distill import dense
from tests.training.cases import opened, small
from tests.training.runs import metrics, run
from tests.training.test_layouts import Gradients, first_gradient

STEPS = 4
SHARE, TEMPERATURE = 0.7, 2.0
SETTINGS: dict[str, Any] = {
    "training__global_batch_size": 4,
    "training__distill__weight": SHARE,
    "training__distill__temperature": TEMPERATURE,
    "optimizer__clip_grad": 0.5,
    "optimizer__learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention, and of another size than the model that learns."""
    folder = tmp_path_factory.mktemp("teacher")
    make(folder, "Qwen3", vocab_size=101, hidden_size=40, num_hidden_layers=3)
    return folder


def trained_curve(grid: Grid, overrides: dict[str, Any], wanted: Gradients) -> Any:
    """(loss, divergence, norm) of each step, and how far this rank's part of the first gradient is away."""
    config = small(**overrides)
    arch, inputs = opened(config)
    trained = build_training(config, arch, grid)
    rows = config.training.global_batch_size
    out, apart = [], {}
    for step in range(STEPS):
        batch = read_step(inputs.train, step, step * rows, rows, 1, grid.dp_rank, grid.dp_size)
        rate = learning_rate(config.optimizer, step, STEPS)
        outcome = train_step(trained, batch.micro_batches, rate, grid, 1, StepFlops(arch))
        out.append((outcome.loss, outcome.distill_loss, outcome.result.norm))
        if step == 0:
            apart = first_gradient(trained, wanted)
    return out, apart


@functools.cache
def expected(teacher: Path, settings: str) -> tuple[list[tuple[float, float, float]], Gradients]:
    """Of one process, plain torch on full logits."""
    config = small(**SETTINGS | json.loads(settings))
    arch, inputs = opened(config)
    model = build_model(config, arch, torch.device("cpu"))
    params = dict(model.named_parameters())
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    out, first = [], {}
    for step in range(STEPS):
        batch = read_step(inputs.train, step, step * 4, 4, 4).micro_batches[0]
        logits = model(*batch.here("cpu").inputs[:3])
        edges = batch.cu_seqlens.tolist()
        theirs = torch.cat([ours(teacher, batch.tokens[a:b]) for a, b in itertools.pairwise(edges)])
        targets = int((batch.labels != -100).sum())
        total, entropy, apart = dense(logits, theirs, batch.labels, SHARE, TEMPERATURE)
        (total / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
        if step == 0:
            first = {name: param.grad.double().numpy() for name, param in params.items()}
        out.append((entropy.sum().item() / targets, apart.sum().item() / targets, float(norm)))
        for group in adam.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        adam.step()
        adam.zero_grad()
    return out, first


LAYOUTS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (1, {}, {"optimizer__zero_stage": 0}),
    (2, {"tp": 2}, {"parallel__vocab_multiple": 32}),
    (2, {"cp": 2}, {"optimizer__zero_stage": 2, "training__recompute": "full"}),
    (2, {}, {"optimizer__zero_stage": 3, "model__tie_embeddings": True}),
    (4, {"tp": 2, "cp": 2}, {}),
]


@pytest.mark.parametrize(("world", "axes", "more"), LAYOUTS)
def test_equal_to_dense_logits_on_one_process(
    run_distributed: Any, teacher: Path, world: int, axes: dict[str, int], more: dict[str, Any]
) -> None:
    function = {name: value for name, value in more.items() if name.startswith("model")}
    curve, gradients = expected(teacher, json.dumps(function))
    more = SETTINGS | more | {"training__distill__teacher": str(teacher)}
    more |= {f"parallel__{name}": size for name, size in axes.items()}
    found = run_distributed(trained_curve, world, more, gradients, **axes)
    for got, _ in found:
        np.testing.assert_allclose(got, curve, rtol=1e-5)
    for name, gradient in gradients.items():
        square = sum(apart[name][0] for _, apart in found if name in apart)
        assert np.sqrt(square) <= 1e-5 * np.linalg.norm(gradient), name


def test_the_metrics_have_both_losses(run_distributed: Any, teacher: Path, tmp_path: Path) -> None:
    more = SETTINGS | {"training__distill__teacher": str(teacher), "training__steps": 2, "evaluation__interval": 2}
    run_distributed(run, 1, tmp_path / "taught", more)
    run_distributed(run, 1, tmp_path / "alone", more | {"training__distill__teacher": None})
    taught, alone = metrics(tmp_path / "taught"), metrics(tmp_path / "alone")
    assert taught[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-6)  # cross entropy both
    assert taught[1]["loss"] != pytest.approx(alone[1]["loss"], abs=1e-4)
    assert 0 < taught[1]["distill_loss"] < taught[0]["distill_loss"]
    assert "distill_loss" not in alone[0]
    assert "valid/synthetic" in taught[1]
