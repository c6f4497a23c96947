"""Adapters against the same model whose weights have the product added by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zebra.attention.contract import Segments
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Lora
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.model.lora import adapter_shapes, adapters, from_metadata, is_target, merged, to_metadata
from megatron_zebra.model.trained import is_trained, part_of
from tests.model.test_decoder import SMALL

LORA = Lora(rank=3, alpha=12.0, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
LENGTH = 30


def make(lora: Lora = LORA, seed: int = 5) -> tuple[Architecture, Decoder]:
    """In fp64; adapters alone are trained, B away from zero."""
    config = load_config(None, SMALL)
    training = config.training.model_copy(update={"lora": lora})
    arch = resolve(config.model, 0, LENGTH)
    init = Initializer(
        seed,
        0.1,
        arch.num_layers,
        torch.float64,
        torch.device("cpu"),
        trained=lambda name: is_trained(name, training),
        lora=lora,
    )
    return arch, Decoder(arch, init)


def moved(model: Decoder) -> Decoder:
    """B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_b"):
                param.normal_(0, 0.1, generator=generator)
    return model


def loss(model: Decoder) -> Any:
    ids = torch.randint(0, 97, (LENGTH + 1,), generator=torch.Generator().manual_seed(2))
    return model(ids[:-1], torch.arange(LENGTH), Segments.from_lengths([LENGTH]), ids[1:])


def test_a_new_adapter_changes_nothing() -> None:
    (_, plain), (_, adapted) = make(Lora()), make()
    assert torch.equal(loss(plain).tokens, loss(adapted).tokens)
    assert not torch.equal(loss(moved(adapted)).tokens, loss(plain).tokens)


def test_loss_and_gradients_equal_those_of_weights_with_the_product_added() -> None:
    (arch, adapted), (_, plain) = make(), make(Lora())
    moved(adapted)
    own = dict(adapted.named_parameters())
    assert {name for name, param in own.items() if param.requires_grad} == set(adapter_shapes(arch, LORA))
    targets = [name for name in arch.parameter_shapes() if is_target(name, LORA)]
    assert len(targets) == 5 * arch.num_layers
    with torch.no_grad():
        for name, param in plain.named_parameters():
            if name in targets:
                a, b = (own[part] for part in adapters(name))
                param += 12.0 / 3 * b @ a
    ours, theirs = loss(adapted), loss(plain)
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=0, atol=1e-12)
    ours.sum.backward()
    theirs.sum.backward()
    dense = {name: param.grad for name, param in plain.named_parameters()}
    for name in targets:
        a, b = (own[part] for part in adapters(name))
        assert own[name].grad is None
        torch.testing.assert_close(a.grad, 4.0 * b.T @ dense[name], rtol=0, atol=1e-11)
        torch.testing.assert_close(b.grad, 4.0 * dense[name] @ a.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("part", [(0, None), (5, 40), (47, 2), (0, 0), (96, 10)])
def test_any_interval_of_a_merged_weight(part: tuple[int, int | None]) -> None:
    arch, model = make()
    tensors = {name: param.detach().float() for name, param in moved(model).named_parameters()}

    def read(name: str, offsets: Any, local_shape: Any, flat_start: int = 0, flat_numel: int | None = None) -> Any:
        box = tensors[name][tuple(slice(o, o + n) for o, n in zip(offsets, local_shape))].reshape(-1)
        return box[flat_start:][:flat_numel]

    name = "layers.2.attention.o_proj.weight"
    a, b = (tensors[one] for one in adapters(name))
    whole = tensors[name] + 4.0 * b @ a
    start, numel = part
    got = merged(
        read, LORA, name, whole.shape, offsets=(7, 30), local_shape=(11, 13), flat_start=start, flat_numel=numel
    )
    want = whole[7:18, 30:43].reshape(-1)[start:][:numel]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(read, LORA, name, whole.shape).view(whole.shape), whole, rtol=0, atol=1e-6)
    norm = "layers.2.mlp_norm.weight"
    assert torch.equal(merged(read, LORA, norm, (arch.hidden_size,)), tensors[norm])


def test_metadata_round_trip() -> None:
    assert to_metadata(from_metadata({"lora": to_metadata(LORA)}, Path("c"))) == to_metadata(LORA)
    assert from_metadata({}, Path("c")) == Lora()
    assert to_metadata(Lora()) is None


def test_parts_are_all_parameters() -> None:
    _, model = make()
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"embedding", "head", "attention", "mlp", "norms"}
    assert parts["norm.weight"] == parts["layers.1.attention_norm.weight"] == "norms"
    assert parts["layers.0.mlp.up_proj.lora_a"] == "mlp"
    assert parts["layers.0.attention.v_proj.weight"] == "attention"
