"""Folders that are not what they say: one line each, and nothing is written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_zebra.checkpoint import files
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.source import open_model
from megatron_zebra.errors import UserError
from tests.convert.models import make

Change = Callable[[Path], None]


def edit(name: str, change: Callable[[dict], object]) -> Change:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def header(name: str, **values: object) -> Change:
    """Other values for a tensor in the header of model.safetensors."""

    def apply(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = struct.unpack_from("<Q", data)[0]
        document = json.loads(data[8 : 8 + size])
        document[name] |= values
        new = json.dumps(document).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])

    return apply


def text(name: str, content: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def tokenizer(largest: int) -> str:
    return json.dumps({"model": {"vocab": {"a": 0, "b": largest}}, "added_tokens": [{"id": 2}]})


UP = "model.layers.1.mlp.up_proj.weight"
CASES: dict[str, tuple[Change, str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights (model.safetensors"),
    "not JSON": (text("config.json", "{"), "config.json: not JSON"),
    "no object": (text("config.json", "[]"), "a JSON object was expected"),
    "unknown": (
        edit("config.json", lambda c: c.update(model_type="bloom")),
        "'bloom' is not known here; known are llama, mistral, ministral, qwen2",
    ),
    "tensor gone": (weights(lambda t: t.pop(UP)), f"tensors are missing that config.json asks for: {UP}"),
    "tensor too many": (
        weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[UP][0].clone()})),
        "no place in the model of config.json: model.layers.0.self_attn.q_proj.bias",
    ),
    "wrong shape": (
        weights(lambda t: t.update({UP: t[UP][:, :-1].contiguous()})),
        f"{UP} has shape [48, 31], by config.json it would be [48, 32]",
    ),
    "config of another width": (
        edit("config.json", lambda c: c.update(intermediate_size=64)),
        "by config.json it would be [64, 32]",
    ),
    "config of more layers": (
        edit("config.json", lambda c: c.update(num_hidden_layers=9)),
        "model.layers.5.input_layernorm.weight",
    ),
    "config of fewer layers": (
        edit("config.json", lambda c: c.update(num_hidden_layers=4)),
        "no place in the model of config.json: model.layers.4",
    ),
    "NaN": (
        weights(lambda t: t[UP][3].fill_(float("nan"))),
        "layers.1.mlp.up_proj.weight has values that are no finite numbers",
    ),
    "infinity": (
        weights(lambda t: t[UP][3].fill_(float("inf"))),
        "layers.1.mlp.up_proj.weight has values that are no finite numbers",
    ),
    "tied, but not": (
        edit("config.json", lambda c: c.update(tie_word_embeddings=True)),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "quantised": (
        weights(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        "is of type I8; F64, F32, F16, BF16 are read",
    ),
    "cut": (cut("model.safetensors", 5000), "cut: 5,000 bytes"),
    "cut header": (cut("model.safetensors", 50), "not a safetensors file, or cut (50 bytes)"),
    "empty": (cut("model.safetensors", 0), "not a safetensors file"),
    "not safetensors": (
        text("model.safetensors", b"\x10" + b"\0" * 7 + b"no JSON at all, no"),
        "its header is not JSON",
    ),
    "odd header": (text("model.safetensors", struct.pack("<Q", 16) + b'{"a": {"x": 12}}'), "nothing sensible of a"),
    "endless shape": (header(UP, shape=[float("inf"), 32]), f"its header says nothing sensible of {UP}"),
    "fraction of a byte": (header(UP, data_offsets=[0.0, 6144.0]), f"its header says nothing sensible of {UP}"),
    "type of a thousand lines": (header(UP, dtype="F32\n" * 1000), "is of type F32?F32?"),
    "model_type is no text": (edit("config.json", lambda c: c.update(model_type=["llama"])), "model_type is ['llama']"),
    "layer_types are no text": (
        edit("config.json", lambda c: c.update(layer_types=[["full_attention"]] * 5)),
        "['full_attention'] is not one of full_attention",
    ),
    "tokenizer.json too large": (
        text("tokenizer.json", tokenizer(61)),
        "tokenizer.json: has a token with id 61, but the embedding has 61 rows",
    ),
    "added tokens too large": (text("added_tokens.json", '{"<x>": 70}'), "added_tokens.json: has a token with id 70"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    make(tmp_path / "hf", "Llama")
    change(tmp_path / "hf")
    with pytest.raises(UserError) as error:
        from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"files are missing that model\.safetensors\.index\.json names: {gone.name}"):
        open_model(tmp_path / "shards")
    (tmp_path / "shards/model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(UserError, match="names a file outside its folder"):
        open_model(tmp_path / "shards")
    index = json.dumps({"weight_map": {"a": "x" * 300}})  # longer than a name can be
    (tmp_path / "shards/model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"files are missing that .* names: xxx"):
        open_model(tmp_path / "shards")
    (tmp_path / "shards/model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map, the file of each tensor, is missing"):
        open_model(tmp_path / "shards")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(tmp_path / "ran"), "w")

    make(tmp_path / "hf", "Llama")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save({"a": Evil()}, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors"):
        open_model(tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def test_sinks_of_granite_swa_that_take_attention_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "GraniteSWA", attention_multiplier=0.25)
    open_model(tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[2].self_attn.sinks[1] = 0.0
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="attention has sinks, which cannot be expressed here"):
        open_model(tmp_path / "hf")


def test_a_tied_head_that_is_stored_all_the_same_is_read(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama", tie_word_embeddings=True)
    weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / "hf")
    assert "head.weight" not in open_model(tmp_path / "hf").names()


def test_a_full_disk_is_found_before_or_cleaned_up_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf", "Llama")
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 67_200_000)
        with pytest.raises(UserError, match="67,200,000 are free"):
            from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left on device"):
            from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/mine").touch()
    with pytest.raises(UserError, match="is there already"):
        from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]
