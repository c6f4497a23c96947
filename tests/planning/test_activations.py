"""The formulas of activation memory against every byte that the real model allocates on CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zebra.attention.segments import Segments
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config, Model
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.context.shard import ContextParallel, ContextShard
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.planning.activations import activations
from megatron_zebra.training.build import build_model

SMALL = {
    "hidden_size": 256,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "ffn_hidden_size": 704,
    "window_size": 64,
}


@dataclass(frozen=True)
class Case:
    """One size: its name says which moment is the highest without recomputation."""

    name: str
    keys: dict[str, object]
    vocab: int
    tokens: int
    chunk: int


CASES = (
    Case("loss, several chunks", {}, 2048, 320, 32),
    Case("mlp, one chunk, tied", {"ffn_hidden_size": 1024, "tie_embeddings": True}, 256, 256, 512),
    Case(
        "loss, qk-norm, two ropes",
        {"num_layers": 4, "num_heads": 6, "head_dim": 64, "qk_norm": True, "rope_local": {"theta": 1e5}},
        2048,
        256,
        64,
    ),
    Case("attention, wide heads", {"ffn_hidden_size": 64, "num_kv_heads": 8, "head_dim": 64}, 64, 512, 64),
)


def build(case: Case, dtype: torch.dtype, recompute: str) -> tuple[Architecture, Decoder]:
    arch = resolve(Model.model_validate({**SMALL, **case.keys}), case.vocab, case.tokens)
    init = Initializer(1, 0.02, arch.num_layers, dtype, torch.device("cpu"))
    return arch, Decoder(arch, init, backend="cpu", recompute=recompute, loss_chunk_size=case.chunk)


def forward(model: Decoder, tokens: int) -> torch.Tensor:
    """Loss of one document, as one micro-batch of ``tokens``."""
    ids = torch.arange(tokens) % 50
    return model(ids, torch.arange(tokens), Segments.from_lengths([tokens]), ids).sum


def kept_bytes(model: Decoder, forward: Callable[[], torch.Tensor]) -> int:
    """Storage that autograd keeps at the end of the forward, each once, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(model: Decoder, forward: Callable[[], torch.Tensor]) -> int:
    """The most that forward and backward of a second micro-batch allocate at once (gradients exist already)."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    forward().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        forward().backward()
    now = highest = 0
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.split(",")[0])
def test_formulas_meet_the_running_model(case: Case, recompute: str) -> None:
    arch, model = build(case, torch.float32, recompute)
    planned = activations(
        arch, case.tokens, element_bytes=4, recompute=recompute, loss_chunk_size=case.chunk, on_cpu=True
    )
    assert planned.peak == pytest.approx(peak_bytes(model, partial(forward, model, case.tokens)), rel=0.1)
    if recompute != "full":
        assert planned.kept == pytest.approx(kept_bytes(model, partial(forward, model, case.tokens)), rel=0.015)
    if recompute == "none":
        assert planned.highest == case.name.split(",")[0]


def test_recomputing_attention_frees_its_half_of_a_block() -> None:
    """As wide as a Llama: all but the block's input and the heads' outputs, 2.5 of 17 hidden states (and fp32 copies)."""
    case = Case("llama", {"num_layers": 2, "num_heads": 4, "num_kv_heads": 1, "ffn_hidden_size": 896}, 64, 128, 128)
    none, attention, full = (
        kept_bytes(model, partial(forward, model, case.tokens))
        for _, model in (build(case, torch.float32, recompute) for recompute in ("none", "attention", "full"))
    )
    assert none - attention > 2 * 128 * 4 * (2.5 * 256)
    assert full < 0.2 * attention


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_formulas_meet_the_running_model_in_bf16(recompute: str) -> None:
    case = Case("loss", {"num_layers": 2}, 1024, 96, 32)
    arch, model = build(case, torch.bfloat16, recompute)
    planned = activations(arch, 96, element_bytes=2, recompute=recompute, loss_chunk_size=32, on_cpu=True)
    assert planned.peak == pytest.approx(peak_bytes(model, partial(forward, model, 96)), rel=0.1)


def test_activations_grow_with_tokens_and_not_with_their_square() -> None:
    arch, _ = build(CASES[0], torch.float32, "none")
    short, long = (
        activations(arch, n, element_bytes=2, recompute="none", loss_chunk_size=32, on_cpu=False).kept
        for n in (2**14, 2**20)
    )
    assert long < 64.1 * short


# --- divided over ranks -----------------------------------------------------------------------------------------------

LENGTH = 384


def of_rank(grid: Grid, keys: dict[str, Any]) -> tuple[int, int]:
    """(kept, peak) bytes of this rank."""
    config = configured(keys)
    arch = resolve(config.model, 512, LENGTH)
    model = build_model(config, arch, grid.device, grid.tp)
    parallel = config.parallel
    keep = parallel.cp_keep_fetched or config.training.recompute != "none"
    context = ContextParallel(grid.cp, parallel.cp_order, parallel.cp_head_groups, keep)
    segments: Any = Segments.from_lengths([LENGTH])
    index = torch.arange(LENGTH)
    if grid.cp.size > 1:
        segments = ContextShard([0, LENGTH], 1, LENGTH, context, grid.device)
        index = torch.from_numpy(segments.local_index)

    def forward() -> torch.Tensor:
        return model(index % 50, index, segments, index % 50).sum

    # Communication may let go of a buffer late, which only ever adds.
    return kept_bytes(model, forward), min(peak_bytes(model, forward) for _ in range(4))


def configured(keys: dict[str, Any]) -> Config:
    base = {f"model.{name}": value for name, value in SMALL.items()} | {
        "model.layer_group_size": 2,
        "training.precision": "fp32",
        "training.loss_chunk_size": 64,
        "data.sequence_length": LENGTH,
    }
    return load_config(None, base | keys)


DIVIDED: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"tp": 2}, {}),
    ({"tp": 2}, {"training.recompute": "full"}),
    ({"tp": 2}, {"model.num_kv_heads": 1, "model.qk_norm": True}),
    ({"cp": 2}, {}),
    ({"cp": 2}, {"parallel.cp_keep_fetched": True, "parallel.cp_order": "contiguous"}),
    ({"cp": 2}, {"training.recompute": "full", "parallel.cp_head_groups": 2}),
    ({"cp": 2}, {"parallel.cp_head_groups": 2}),
]


@pytest.mark.parametrize(("axes", "keys"), DIVIDED, ids=lambda value: str(value))
def test_formulas_meet_the_ranks_of_a_divided_model(
    run_distributed: Any, axes: dict[str, int], keys: dict[str, Any]
) -> None:
    keys = keys | {f"parallel.{name}": size for name, size in axes.items()}
    config = configured(keys)
    planned = activations(
        resolve(config.model, 512, LENGTH),
        LENGTH,
        element_bytes=4,
        recompute=config.training.recompute,
        loss_chunk_size=64,
        on_cpu=True,
        parallel=config.parallel,
    )
    found = run_distributed(of_rank, 2, keys, **axes)
    kept, peak = (max(of_ranks) for of_ranks in zip(*found))
    # Where keys are fetched again, hooks of that hide from others what the kernel keeps.
    if config.training.recompute == "none" and (config.parallel.cp == 1 or config.parallel.cp_keep_fetched):
        assert planned.kept == pytest.approx(kept, rel=0.02)
    assert planned.peak == pytest.approx(peak, rel=0.15)
