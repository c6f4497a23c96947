"""The formulas of activation memory against every byte that the real model allocates on CPU."""

from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zebra.attention.segments import Segments
from megatron_zebra.config.sections import Model
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.planning.activations import activations

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


def kept_bytes(model: Decoder, tokens: int) -> int:
    """Storage that autograd keeps at the end of the forward, each once, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, tokens)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(model: Decoder, tokens: int) -> int:
    """The most that forward and backward of a second micro-batch allocate at once (gradients exist already)."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    forward(model, tokens).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        forward(model, tokens).backward()
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
    assert planned.peak == pytest.approx(peak_bytes(model, case.tokens), rel=0.1)
    if recompute == "none":
        assert planned.kept == pytest.approx(kept_bytes(model, case.tokens), rel=0.01)
        assert planned.highest == case.name.split(",")[0]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_formulas_meet_the_running_model_in_bf16(recompute: str) -> None:
    case = Case("loss", {"num_layers": 2}, 1024, 96, 32)
    arch, model = build(case, torch.bfloat16, recompute)
    planned = activations(arch, 96, element_bytes=2, recompute=recompute, loss_chunk_size=32, on_cpu=True)
    assert planned.peak == pytest.approx(peak_bytes(model, 96), rel=0.1)


def test_activations_grow_with_tokens_and_not_with_their_square() -> None:
    arch, _ = build(CASES[0], torch.float32, "none")
    short, long = (
        activations(arch, n, element_bytes=2, recompute="none", loss_chunk_size=32, on_cpu=False).kept
        for n in (2**14, 2**20)
    )
    assert long < 64.1 * short
