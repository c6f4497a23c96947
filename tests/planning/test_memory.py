"""Weights, gradients, optimizer and buffers of a rank: the formulas against what the running optimizers allocate."""

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Model
from megatron_zebra.data.batch import read_step
from megatron_zebra.model.architecture import resolve
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.planning.memory import parameter_count, reduction_buffers, state_parts, training_memory
from megatron_zebra.training.build import build_model, build_optimizer
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small

BUCKET = 1_000_000
SIZES: dict[str, Any] = {
    "model__hidden_size": 256,
    "model__ffn_hidden_size": 1024,
    "model__vocab_size": 1024,
    "data__sequence_length": 32,
    "model__num_layers": 2,
    "deepspeed__zero_optimization__reduce_bucket_size": BUCKET,
    "deepspeed__zero_optimization__stage3_param_persistence_threshold": 0,
}


def allocated(trace: profile) -> tuple[int, int]:
    """Bytes that are still there at the end, and the most at once."""
    now = highest = 0
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return now, highest


def measured(grid: Grid, stage: int, precision: str) -> tuple[int, int, int]:
    """(parameters, bytes that stay after the model and optimizer are built, most bytes beyond them in a step)."""
    rows = 2 * grid.dp_size
    config = small(
        **SIZES, optimizer__zero_stage=stage, training__precision=precision, training__global_batch_size=rows
    )
    arch, inputs = opened(config)
    gc.collect()  # the engine of a test before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as built:
        optimizer = build_optimizer(config, build_model(config, arch, grid.device), grid)
        gc.collect()
    for step in range(2):
        micro_batches = read_step(inputs.train, step, step * rows, rows, 1, grid.dp_rank, grid.dp_size).micro_batches
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepped:
            train_step(optimizer, micro_batches, 1e-4, grid, 1, StepFlops(arch))
    return parameter_count(arch), allocated(built)[0], allocated(stepped)[1]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_is_what_the_optimizers_hold(run_distributed: Any, stage: int, precision: str, world_size: int) -> None:
    e = 2 if precision == "bf16" else 4
    for parameters, resident, in_step in run_distributed(measured, world_size, stage, precision):
        weights, gradients, optimizer = (part.bytes for part in state_parts(parameters, e, stage, world_size))
        gathered = parameters * e if stage == 3 else 0
        early = 0  # gradients and buffers that are made with the optimizer rather than in the first step
        if stage == 3:
            early = gradients + 4 * BUCKET
        elif stage == 1 and precision == "bf16":
            early = gradients
        # DeepSpeed pads its flat groups; its stage 3 has some buffers of single parameters (large beside this model).
        assert resident == pytest.approx(weights - gathered + optimizer + early, rel=0.1 if stage == 3 else 0.005)
        # The tokens of this test are few, and what activations it has are allowed for; what is planned is there.
        planned = gathered + gradients + reduction_buffers(parameters, e, stage, BUCKET) - early
        assert planned * (0.8 if stage == 3 else 0.98) <= in_step <= planned * 1.02 + 8 * 2**20


def test_parts_and_precision() -> None:
    assert [part.bytes for part in state_parts(1000, 2, 1, 4)] == [2000, 4000, 3000]
    assert [part.bytes for part in state_parts(1000, 2, 0, 4)] == [2000, 4000, 12000]
    assert [part.bytes for part in state_parts(1000, 4, 0, 4)] == [4000, 4000, 8000]
    assert [part.bytes for part in state_parts(1000, 2, 3, 4)] == [2500, 1000, 3000]
    assert state_parts(10, 2, 1, 3)[2].bytes == 40  # a share is rounded up


def test_the_whole_is_the_sum_and_zero_saves() -> None:
    config = load_config(None, {"training.precision": "bf16"})
    arch = resolve(Model(), 32000, 2048)
    whole = []
    for stage in (0, 1, 2, 3):
        staged = load_config(None, {"training.precision": "bf16", "optimizer.zero_stage": stage})
        memory = training_memory(arch, staged, 64, 2048)
        assert memory.total == sum(part.bytes for part in memory.parts)
        whole.append(memory["weights"] + memory["gradients"] + memory["optimizer"])
    assert whole[0] > whole[1] > whole[2]
    assert training_memory(arch, config, 1, 4096)["activations"] > training_memory(arch, config, 1, 2048)["activations"]


def test_parameter_count_is_the_models() -> None:
    for tied in (False, True):
        arch, _ = opened(config := small(model__tie_embeddings=tied, model__qkv_bias=True, model__qk_norm=True))
        assert parameter_count(arch) == sum(
            p.numel() for p in build_model(config, arch, torch.device("cpu")).parameters()
        )
