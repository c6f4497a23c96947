"""Bytes between ranks: closed forms, and what the ranks of real steps counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.data.batch import read_step
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.communication import (
    context_bytes,
    data_bytes,
    pipeline_bytes,
    step_bytes,
    tensor_bytes,
    tied_bytes,
)
from megatron_zebra.planning.flops import StepFlops
from megatron_zebra.planning.parameters import held_parameters, parameter_count
from megatron_zebra.training.build import build_training
from megatron_zebra.training.step import train_step
from tests.training.cases import opened, small

ROW = 2 * 2 * 64 * 2  # bytes of a token's K and V: 2 heads of 64 in bf16
MODEL = {"model.num_kv_heads": 2, "training.precision": "bf16", "model.window_size": 16}


def configured(**keys: Any) -> tuple[Config, Architecture]:
    config = load_config(None, MODEL | {name.replace("__", "."): value for name, value in keys.items()})
    return config, resolve(config.model, 1000, config.data.sequence_length)


@pytest.mark.parametrize(("order", "windows"), [("contiguous", 1), ("zigzag", 2)])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_P08_a_local_layer_brings_the_same_at_every_length(cp: int, order: str, windows: int) -> None:
    config, arch = configured(parallel__cp=cp, parallel__cp_order=order)
    seen = {tuple(context_bytes(arch, config, 16, [0, 96 * n], 96 * n)) for n in (4, 8, 64, 10_000)}
    (received,) = seen
    # Keys of at most w tokens a stretch, and gradients of as many.
    assert max(received) <= 2 * windows * 16 * ROW
    assert sum(received) == 2 * 16 * ROW * ((2 * cp - 2) if order == "zigzag" else cp - 1)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_a_global_layer_brings_all_that_is_before(cp: int) -> None:
    length = 64 * cp
    contiguous, arch = configured(parallel__cp=cp, parallel__cp_order="contiguous", parallel__cp_keep_fetched=True)
    received = context_bytes(arch, contiguous, None, [0, length], length) // ROW
    # Rank r fetches r chunks, and gets gradients of its own from the cp - 1 - r after it.
    assert received.tolist() == [64 * (cp - 1)] * cp
    zigzag, _ = configured(parallel__cp=cp, parallel__cp_keep_fetched=True)
    again, _ = configured(parallel__cp=cp)
    once, twice = (context_bytes(arch, c, None, [0, length], length) // ROW for c in (zigzag, again))
    chunk = 32  # zigzag: what chunk 2 cp - 1 - r wants is all 2 cp - 1 - r before it but the rank's own chunk r
    fetched = np.array([(2 * cp - 1 - r - 1) * chunk for r in range(cp)])
    assert (twice - once).tolist() == fetched.tolist()
    assert once.sum() == 2 * fetched.sum()
    if cp == 4:
        assert fetched.max() == 3 * length // 4


def test_recomputation_fetches_again_and_once_only() -> None:
    for window in (16, None):
        kept, again = (
            context_bytes(arch, config, window, [0, 384], 384).sum()
            for config, arch in (
                configured(parallel__cp=2, parallel__cp_keep_fetched=True, training__recompute=recompute)
                for recompute in ("none", "full")
            )
        )
        assert again * 2 == kept * 3


def test_documents_within_a_chunk_send_nothing() -> None:
    config, arch = configured(parallel__cp=2)
    for window in (16, None):
        assert not context_bytes(arch, config, window, np.arange(0, 385, 32), 384).any()


def test_tensor_parallelism_by_hand() -> None:
    config, arch = configured(parallel__tp=2, training__loss_chunk_size=100)
    h, tokens = arch.hidden_size, 250
    whole = tokens * h * 2
    layer = 8 * whole // 2 + 2 * h * 2
    assert tensor_bytes(arch, config, 3, False, False, tokens) == 3 * layer
    assert tensor_bytes(arch, config, 0, True, False, tokens) == whole
    assert tensor_bytes(arch, config, 0, False, True, tokens) == whole + h * 2 + 3 * 4 * tokens
    full, _ = configured(parallel__tp=2, training__recompute="full")
    assert tensor_bytes(arch, full, 1, False, False, tokens) == layer + 3 * whole // 2
    alone, _ = configured()
    assert tensor_bytes(arch, alone, 8, True, True, tokens) == 0


def test_hidden_states_cross_each_boundary_between_ranks_twice() -> None:
    # (rank 0, a middle rank, the last): of 4, 8 and 8 stages; the V's innermost two are on one rank.
    for schedule, boundaries in (("1f1b", [1, 2, 1]), ("interleaved", [3, 4, 3]), ("zero_bubble", [2, 4, 2])):
        config, arch = configured(parallel__pp=4, parallel__pp_schedule=schedule, parallel__tp=2)
        stages = stages_of(config, arch)
        received = [pipeline_bytes(arch, config, stages, rank, 100) for rank in (0, 1, 3)]
        assert received == [n * 50 * arch.hidden_size * 2 for n in boundaries]


def test_data_parallelism_by_stage() -> None:
    assert [data_bytes(1000, 2, stage, 4, 3) for stage in range(4)] == [6000, 7500, 19500, 18000]
    assert [data_bytes(1000, 2, stage, 1, 3) for stage in range(4)] == [0] * 4


def test_held_parameters_add_up() -> None:
    config, arch = configured(parallel__pp=4)
    stages = stages_of(config, arch)
    assert sum(held_parameters(arch, config.parallel, stages, rank)[0] for rank in range(4)) == parameter_count(arch)
    tied, tied_arch = configured(parallel__pp=2, model__tie_embeddings=True)
    stages = stages_of(tied, tied_arch)
    copy = 1000 * arch.hidden_size
    held = [held_parameters(tied_arch, tied.parallel, stages, rank)[0] for rank in range(2)]
    assert sum(held) == parameter_count(tied_arch) + copy
    assert [tied_bytes(tied_arch, tied, stages, rank) for rank in range(2)] == [4 * copy] * 2


# --- against the counter ----------------------------------------------------------------------------------------------


def counted(grid: Grid, overrides: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """(planned, counted) bytes of this rank in a step, by name."""
    config = small(**overrides)
    arch, inputs = opened(config)
    trained = build_training(config, arch, grid)
    rows, micro = config.training.global_batch_size, config.training.micro_batch_size
    batches = read_step(inputs.train, 0, 0, rows, micro, grid.dp_rank, grid.dp_size).micro_batches
    grid.traffic.reset()
    train_step(trained, batches, 1e-3, grid, 1, StepFlops(arch))
    stages, place = stages_of(config, arch), grid.layout.coordinates(grid.rank)
    planned = step_bytes(arch, config, grid.layout, stages, place.pp, place.cp, [batch.cu_seqlens for batch in batches])
    return dict(planned), dict(grid.traffic.bytes)


CASES: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (2, {"tp": 2}, {"model__qk_norm": True}),
    (2, {"tp": 2}, {"training__recompute": "full", "model__num_kv_heads": 1, "model__qkv_bias": True}),
    (2, {"cp": 2}, {"training__precision": "bf16", "training__micro_batch_size": 2}),
    (2, {"cp": 2}, {"parallel__cp_keep_fetched": True, "parallel__cp_order": "contiguous"}),
    (2, {"cp": 2}, {"training__recompute": "full", "parallel__cp_head_groups": 2}),
    (2, {"cp": 2}, {"training__recompute": "attention"}),
    (4, {"tp": 2, "cp": 2}, {"training__recompute": "attention", "model__qk_norm": True}),
    (2, {"pp": 2}, {"model__tie_embeddings": True}),
    (4, {"tp": 2, "cp": 2}, {}),
    (4, {"cp": 2, "pp": 2}, {"training__recompute": "full"}),
]


@pytest.mark.parametrize(("world", "axes", "keys"), CASES, ids=[f"{a} {list(k.values())}" for _, a, k in CASES])
def test_planned_bytes_are_those_that_were_counted(
    run_distributed: Any, world: int, axes: dict[str, int], keys: dict[str, Any]
) -> None:
    overrides = keys | {f"parallel__{name}": size for name, size in axes.items()}
    for planned, seen in run_distributed(counted, world, overrides, **axes):
        for name in ("cp local", "cp global", "tp", "pp", "ends"):
            assert planned.get(name, 0) == seen.get(name, 0), (name, planned, seen)


def test_a_step_is_the_sum_of_its_parts() -> None:
    config, arch = configured(parallel__tp=2, parallel__cp=2, parallel__pp=2, data__sequence_length=256)
    stages = stages_of(config, arch)
    layout = Layout(pp=2, dp=2, cp=2, tp=2)
    total = step_bytes(arch, config, layout, stages, 1)
    micro = config.training.global_batch_size // 2
    assert set(total) == {"cp local", "cp global", "tp", "pp", "data"}
    assert total["pp"] == micro * 64 * arch.hidden_size * 2
    by_rows = step_bytes(arch, config, layout, stages, 1, batches=[[0, 256]] * micro)
    assert by_rows == total
    assert isinstance(total, Counter)
