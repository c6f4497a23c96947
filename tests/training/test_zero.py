"""Every ZeRO stage on any number of processes and micro-batches gives one process's losses and gradient norms."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from megatron_zebra.data.batch import read_step
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.training.build import build_model, build_training
from megatron_zebra.training.schedule import learning_rate
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small

STEPS = 10
CUTS = [(1, 4), (2, 4), (4, 1), (4, 4)]
Curve = list[tuple[float, float]]


def curve(grid: Grid, overrides: dict[str, Any]) -> Curve:
    """(loss, gradient norm) of each step, by the code that trains."""
    config = small(**overrides)
    arch, inputs = opened(config)
    trained = build_training(config, arch, grid)
    rows = config.training.global_batch_size
    out = []
    for step in range(STEPS):
        batch = read_step(
            inputs.train, step, step * rows, rows, config.training.micro_batch_size, grid.dp_rank, grid.dp_size
        )
        rate = learning_rate(config.optimizer, step, STEPS)
        outcome = train_step(trained, batch.micro_batches, rate, grid, 1, StepFlops(arch))
        out.append((outcome.loss, outcome.result.norm))
    return out


def reference(
    overrides: dict[str, Any],
    world_size: int = 1,
    by_rank: bool = True,
    first_gradient: dict[str, np.ndarray] | None = None,
    steps: int = STEPS,
) -> Curve:
    """One process, plain torch: autograd and AdamW on fp32 masters; in fp32 the whole global batch at once.

    In bf16 the micro-batches of ``world_size`` ranks, their gradients added in fp32 in the order of these: each rank's own
    first, or (``by_rank`` false) each micro-batch over the ranks first. Another order changes a sum in its last bit, which
    in a few steps turns the rounding of some bf16 weight. ``first_gradient`` is filled with the first clipped gradient.
    """
    config = small(**overrides)
    arch, inputs = opened(config)
    model: Decoder = build_model(config, arch, torch.device("cpu"))
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    params = [param for _, param in named]
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    rows = config.training.global_batch_size
    whole = config.training.precision == "fp32"
    micro, ranks = (rows, 1) if whole else (config.training.micro_batch_size, world_size)
    out = []
    for step in range(steps):
        read = [
            read_step(inputs.train, step, step * rows, rows, micro, rank, ranks).micro_batches for rank in range(ranks)
        ]
        targets = sum(batch.here("cpu").targets for batches in read for batch in batches)
        total = 0.0
        gradients: list[list[list[torch.Tensor]]] = []  # by rank, micro-batch, parameter
        for batches in read:
            gradients.append([])
            for batch in batches:
                loss = model(*batch.here("cpu").inputs)
                (loss.sum / targets).backward()
                total += loss.tokens.double().sum().item()
                gradients[-1].append([param.grad.float() for param in params if param.grad is not None])
                for param in params:
                    param.grad = None
        parts = gradients if by_rank else list(zip(*gradients))
        for number, master in enumerate(masters):
            master.grad = sum(sum(one[number] for one in part) for part in parts)  # type: ignore[assignment]
        norm = torch.nn.utils.clip_grad_norm_(masters, config.optimizer.clip_grad or 1e30).item()
        for group in adam.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, STEPS)
        if step == 0 and first_gradient is not None:
            first_gradient |= {
                name: master.grad.double().numpy()
                for (name, _), master in zip(named, masters)
                if master.grad is not None
            }
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


def cut(world_size: int, micro_batches: int) -> dict[str, Any]:
    """Sixteen rows of ragged documents over so many processes, so many micro-batches each."""
    return {
        "model__num_layers": 2,
        "data__sequence_length": 32,
        "training__global_batch_size": 16,
        "training__micro_batch_size": 16 // (world_size * micro_batches),
    }


@functools.cache
def expected(precision: str, world_size: int, micro_batches: int, by_rank: bool) -> Curve:
    settings = {"training__precision": precision, "optimizer__clip_grad": 0.5 if precision == "fp32" else 0.0}
    return reference(cut(world_size, micro_batches) | settings, world_size, by_rank)


@pytest.mark.parametrize(("world_size", "micro_batches"), CUTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_L01_L03_fp32(run_distributed: Any, stage: int, world_size: int, micro_batches: int) -> None:
    settings = cut(world_size, micro_batches) | {"optimizer__zero_stage": stage}
    for got in run_distributed(curve, world_size, settings):
        assert_same(got, expected("fp32", 1, 1, True), 1e-5)


@pytest.mark.parametrize(("world_size", "micro_batches"), CUTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_has_fp32_sums_and_masters(run_distributed: Any, stage: int, world_size: int, micro_batches: int) -> None:
    settings = {"training__precision": "bf16", "optimizer__clip_grad": 0.0, "optimizer__zero_stage": stage}
    for got in run_distributed(curve, world_size, cut(world_size, micro_batches) | settings):
        assert_same(got, expected("bf16", world_size, micro_batches, stage < 2), 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings(run_distributed: Any, stage: int) -> None:
    settings = cut(2, 1) | {"model__tie_embeddings": True}
    want = reference(settings)
    for got in run_distributed(curve, 2, settings | {"optimizer__zero_stage": stage}):
        assert_same(got, want, 1e-5)
