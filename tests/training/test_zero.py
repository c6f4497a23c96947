"""Every ZeRO stage on any number of processes and micro-batches gives one process's losses and gradient norms."""

from typing import Any

import pytest
import torch

from megatron_zebra.data.batch import read_step
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import build_model, build_optimizer
from megatron_zebra.training.schedule import learning_rate
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small

STEPS = 10
Curve = list[tuple[float, float]]


def curve(grid: Grid, overrides: dict[str, Any]) -> Curve:
    """(loss, gradient norm) of each step, by the code that trains."""
    config = small(**overrides)
    arch, inputs = opened(config)
    optimizer = build_optimizer(config, build_model(config, arch, grid.device), grid)
    rows = config.training.global_batch_size
    out = []
    for step in range(STEPS):
        batch = read_step(
            inputs.train, step, step * rows, rows, config.training.micro_batch_size, grid.dp_rank, grid.dp_size
        )
        rate = learning_rate(config.optimizer, step, STEPS)
        outcome = train_step(optimizer, batch.micro_batches, rate, grid, 1, StepFlops(arch))
        out.append((outcome.loss, outcome.result.norm))
    return out


def reference(overrides: dict[str, Any], world_size: int = 1, by_rank: bool = True) -> Curve:
    """One process, plain torch: the whole global batch as one micro-batch of autograd, AdamW on fp32 masters.

    In bf16 the gradients of the rows are added in fp32 in the order of ``world_size`` ranks: each rank's own first, or
    (``by_rank`` false) each micro-batch over the ranks first. Another order changes a sum in its last bit, which in a
    few steps turns the rounding of some bf16 weight.
    """
    config = small(**overrides)
    arch, inputs = opened(config)
    model: Decoder = build_model(config, arch, torch.device("cpu"))
    params = list(model.parameters())
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    rows = config.training.global_batch_size
    micro = rows if config.training.precision == "fp32" else 1
    out = []
    for step in range(STEPS):
        batches = read_step(inputs.train, step, step * rows, rows, micro).micro_batches
        targets = sum(batch.targets for batch in batches)
        total = 0.0
        gradients: list[list[torch.Tensor]] = []
        for batch in batches:
            loss = model(*batch.inputs("cpu"))
            (loss.sum / targets).backward()
            total += loss.tokens.double().sum().item()
            gradients.append([param.grad.float() for param in params if param.grad is not None])
            for param in params:
                param.grad = None
        if by_rank:
            parts = [gradients[rank::world_size] for rank in range(world_size)]
        else:
            parts = [gradients[first : first + world_size] for first in range(0, len(gradients), world_size)]
        for number, master in enumerate(masters):
            master.grad = sum(sum(row[number] for row in part) for part in parts if part)  # type: ignore[assignment]
        norm = torch.nn.utils.clip_grad_norm_(masters, config.optimizer.clip_grad or 1e30).item()
        for group in adam.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        adam.step()
        with torch.no_grad():
            for param, master in zip(params, masters):
                param.copy_(master)
        out.append((total / targets, norm))
    return out


def assert_same(got: Curve, want: Curve, tolerance: float) -> None:
    for step, ((loss, norm), (loss_, norm_)) in enumerate(zip(got, want)):
        assert abs(loss - loss_) <= tolerance, f"loss of step {step}: {loss} for {loss_}"
        assert abs(norm - norm_) <= tolerance * norm_, f"norm of step {step}: {norm} for {norm_}"


@pytest.fixture(scope="module")
def fp32() -> Curve:
    return reference({})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_L01_L03_fp32(run_distributed: Any, fp32: Curve, stage: int, world_size: int, micro_batch_size: int) -> None:
    overrides = {"optimizer__zero_stage": stage, "training__micro_batch_size": micro_batch_size}
    for got in run_distributed(curve, world_size, overrides):
        assert_same(got, fp32, 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bf16_has_fp32_sums_and_masters(run_distributed: Any, stage: int, world_size: int) -> None:
    settings = {"training__precision": "bf16", "optimizer__clip_grad": 0.0}
    want = reference(settings, world_size, by_rank=stage < 2)
    for got in run_distributed(curve, world_size, settings | {"optimizer__zero_stage": stage}):
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings(run_distributed: Any, stage: int) -> None:
    settings = {"model__tie_embeddings": True}
    want = reference(settings)
    for got in run_distributed(curve, 2, settings | {"optimizer__zero_stage": stage}):
        assert_same(got, want, 1e-5)
