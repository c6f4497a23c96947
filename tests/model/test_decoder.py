"""The decoder against transformers and against itself: windows, RoPE, packing, recomputation, initialisation."""

from typing import Any

import pytest
import torch

from benchmarks.transformers_model import their_name, transformers_cwm
from megatron_zebra.attention.contract import Segments
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Rope
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.decoder import Decoder, Loss
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.rope import inverse_frequencies

CPU = torch.device("cpu")
LENGTH = 100
SMALL: dict[str, Any] = {
    "model.hidden_size": 48,
    "model.num_layers": 5,
    "model.num_heads": 6,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.ffn_hidden_size": 80,
    "model.vocab_size": 97,
    "model.layer_group_size": 4,
    "model.window_size": 7,
    "model.init_std": 0.1,
}


def make(
    dtype: torch.dtype = torch.float32, recompute: str = "none", device: torch.device = CPU, **overrides: Any
) -> tuple[Architecture, Decoder]:
    settings = SMALL | {f"model.{name.replace('__', '.')}": value for name, value in overrides.items()}
    config = load_config(None, settings).model
    arch = resolve(config, 0, LENGTH)
    init = Initializer(5, config.init_std, arch.num_layers, dtype, device)
    return arch, Decoder(arch, init, recompute=recompute, loss_chunk_size=33)


def tokens(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


def logits(model: Decoder, ids: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    lengths = lengths or [len(ids)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        out = model(ids, positions, Segments.from_lengths(lengths))
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
def test_W02_logits_equal_transformers_beyond_the_window(attention: str, tied: bool) -> None:
    arch, model = make(tie_embeddings=tied)
    theirs = transformers_cwm(arch, model, attention)
    for length in (7, 8, 9, 24, LENGTH):
        ids = tokens(length)
        with torch.no_grad():
            want = theirs(ids[None]).logits[0]
        torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=2e-5)


def test_loss_and_gradients_equal_transformers() -> None:
    arch, model = make()
    theirs = transformers_cwm(arch, model, "eager").train()
    ids = tokens()
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    loss = model(ids, torch.arange(LENGTH), Segments.from_lengths([LENGTH]), labels)
    assert isinstance(loss, Loss)
    (loss.sum / (LENGTH - 1)).backward()
    want = theirs(ids[None], labels=ids[None]).loss
    want.backward()
    torch.testing.assert_close(loss.sum / (LENGTH - 1), want, rtol=1e-6, atol=0)
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    for name, ours in model.named_parameters():
        want = reference[their_name(name)]
        assert (ours.grad - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("lengths", [[1, 40, 3, 56], [100], [25] * 4])
def test_packed_documents_equal_each_document_alone(lengths: list[int]) -> None:
    _, model = make()
    ids = tokens(sum(lengths))
    packed = logits(model, ids, lengths)
    alone = torch.cat([logits(model, part) for part in ids.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_P01_a_key_beyond_every_window_moves_nothing() -> None:
    """All layers local: what is more than num_layers * w away cannot be seen; one token nearer can."""
    _, model = make(dtype=torch.float64, layer_kinds=["local"] * 5)
    ids = tokens()
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % 97
    moved = (logits(model, ids) - logits(model, changed)).abs().amax(-1)
    assert moved[10 + 5 * 7] > 1e-9
    assert moved[10 + 5 * 7 + 1 :].max() == 0


@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_recomputation_changes_no_gradient(recompute: str) -> None:
    def gradients(mode: str) -> list[torch.Tensor]:
        _, model = make(torch.float64, mode, qkv_bias=True, qk_norm=True)
        ids = tokens()
        loss = model(ids, torch.arange(LENGTH), Segments.from_lengths([60, 40]), ids.roll(-1))
        loss.sum.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for got, want in zip(gradients(recompute), gradients("none"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_every_parameter_is_in_the_table_and_gets_a_gradient() -> None:
    arch, model = make(qkv_bias=True, qk_norm=True)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == arch.parameter_shapes()
    ids = tokens()
    model(ids, torch.arange(LENGTH), Segments.from_lengths([LENGTH]), ids.roll(-1)).sum.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    _, one = make()
    _, deeper = make(num_layers=7)
    assert torch.equal(one.layers["3"].mlp.up_proj.weight, deeper.layers["3"].mlp.up_proj.weight)
    std = one.layers["3"].mlp.up_proj.weight.std().item()
    assert abs(std - 0.1) < 0.01
    assert abs(one.layers["3"].mlp.down_proj.weight.std().item() - 0.1 / 10**0.5) < 0.004
    assert not torch.equal(one.layers["3"].mlp.up_proj.weight, one.layers["2"].mlp.up_proj.weight)


ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rope_type": "default"}),
    ({"scaling": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    (
        {"scaling": "yarn", "factor": 4.0, "original_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    (
        {"scaling": "yarn", "factor": 4.0, "original_length": 32, "attention_factor": 0.9, "beta_fast": 16.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.9,
            "beta_fast": 16.0,
        },
    ),
    (
        {"scaling": "llama3", "factor": 8.0, "original_length": 64, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(("ours", "theirs"), ROPES, ids=[str(t["rope_type"]) + str(len(t)) for _, t in ROPES])
def test_W11_V06_V10_rope_equals_transformers(theta: float, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    arch, model = make(rope={"theta": theta, **ours})
    reference = transformers_cwm(arch, model, "sdpa", {"rope_theta": theta, **theirs})
    ids = tokens()
    with torch.no_grad():
        want = reference(ids[None]).logits[0]
    torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("length", [16, 100, 400])
def test_dynamic_rope_equals_transformers_at_its_length(length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=parameters)
    embedding = LlamaRotaryEmbedding(config)
    cos, _ = embedding(torch.zeros(1), torch.arange(length)[None])
    rope = Rope(scaling="dynamic", factor=2.0, original_length=64, length=length)
    frequencies, factor = inverse_frequencies(rope, 16)
    angles = torch.arange(length)[:, None] * frequencies
    torch.testing.assert_close(angles.cos() * factor, cos[0, :, :8], rtol=0, atol=1e-5)


def test_rope_may_differ_by_layer_kind() -> None:
    def moved(**overrides: Any) -> torch.Tensor:
        _, other = make(**overrides)
        return (logits(other, tokens()) - base).abs().max()

    base = logits(make()[1], tokens())
    assert moved(rope_local={"theta": 10000.0}) == 0
    assert moved(rope_local={"theta": 500.0}) > 1e-3
    assert moved(layer_kinds=["local"] * 5, rope={"theta": 7.0}, rope_local={"theta": 10000.0}) == pytest.approx(
        float(moved(layer_kinds=["local"] * 5))
    )


def test_W07_a_backend_that_cannot_is_refused_by_name_and_layer() -> None:
    config = load_config(None, SMALL | {"model.attention_backend": "flash"}).model
    arch = resolve(config, 0, LENGTH)
    with pytest.raises(ValueError, match=r"flash.*layer 0"):
        Decoder(arch, Initializer(0, 0.02, 5, torch.float32, CPU), backend="flash")
