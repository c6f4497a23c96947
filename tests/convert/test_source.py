"""Any interval of any box of any weight, from every form a model can be in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.checkpoint import layout
from megatron_zebra.convert.boxes import box_of, cut
from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.source import ModelSource, open_model
from megatron_zebra.errors import UserError
from tests.convert.models import ids, make, ours, theirs


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every form."""
    root = tmp_path_factory.mktemp("forms")
    model = make(root / "safetensors", "Qwen2")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    weights = model.state_dict()
    for name in ("bin", "bin-shards"):
        (root / name).mkdir()
        shutil.copy(root / "safetensors/config.json", root / name)
    torch.save(weights, root / "bin/pytorch_model.bin")
    places = {tensor: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, tensor in enumerate(weights)}
    for file in set(places.values()):
        torch.save({n: weights[n] for n, place in places.items() if place == file}, root / "bin-shards" / file)
    (root / "bin-shards/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    from_hf(root / "safetensors", root / "checkpoint")
    shutil.copytree(root / "checkpoint", root / "run/checkpoints/step-00000000")
    names = ("safetensors", "shards", "bin", "bin-shards", "checkpoint", "run")
    return {"model": root / "safetensors"} | {name: root / name for name in names}


FORMS = ("safetensors", "shards", "bin", "bin-shards", "checkpoint", "run")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(forms: dict[str, Path], form: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = theirs(AutoModelForCausalLM.from_pretrained(forms["model"]).eval(), ids())
    assert (ours(forms[form], ids()) - expected).abs().max() < 1e-4
    assert architecture_of(forms[form]) == architecture_of(forms["model"])


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_those_of_the_whole(forms: dict[str, Path], form: str) -> None:
    source: ModelSource = open_model(forms[form])
    arch = source.architecture
    assert source.names() == sorted(arch.parameter_shapes())
    whole = source.read_tensor("layers.2.mlp.down_proj.weight").view(32, 48)
    part = source.read_tensor(
        "layers.2.mlp.down_proj.weight", offsets=(8, 12), local_shape=(16, 24), flat_start=30, flat_numel=100
    )
    assert torch.equal(part, whole[8:24, 12:36].reshape(-1)[30:130])
    assert source.read_tensor("embedding.weight", offsets=(61, 0), local_shape=(0, 32)).numel() == 0
    assert torch.equal(source.read_tensor("norm.weight", flat_start=5), source.read_tensor("norm.weight")[5:])
    assert source.dtype("norm.weight") == "float32"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_is_slicing(data: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    local = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets))
    whole = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    flat = whole[tuple(slice(o, o + n) for o, n in zip(offsets, local))].reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    count = data.draw(st.integers(0, len(flat) - start))
    box = box_of("x", "weight", shape, offsets, local, start, count)
    assert torch.equal(cut(whole, box), flat[start : start + count])


def test_moments_of_a_foreign_model_are_refused(forms: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="only weights are there, no exp_avg"):
        open_model(forms["shards"]).read_tensor("norm.weight", "exp_avg")


def test_a_path_that_holds_no_model(tmp_path: Path) -> None:
    for opened in (open_model, architecture_of):
        with pytest.raises(UserError, match="holds no model; allowed are"):
            opened(tmp_path)
        with pytest.raises(UserError, match="holds no model; allowed are"):
            opened(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"ffn_hidden_size": 7}}, r"gate_proj.weight has shape \[\d+, 32\], by its metadata it would be \[7, 32\]"),
        ({"architecture": {"qk_norm": True}}, "a tensor is missing that its metadata ask for: layers.0.attention.q_norm.weight"),
        ({"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]}}, "ask for: layers.0.attention.q_proj.lora_a"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_the_model_it_says_is_refused(
    forms: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(forms["checkpoint"], folder)
    index = json.loads((folder / layout.INDEX).read_text())
    del index["checksum"]
    for key, values in change.items():
        index["metadata"][key] = index["metadata"].get(key, {}) | values
    (folder / layout.INDEX).write_text(json.dumps(index | {"checksum": layout.checksum(layout._canonical(index))}))
    with pytest.raises(UserError, match=message):
        open_model(folder)
