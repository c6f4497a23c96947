"""What to-hf writes: windows, generation, shards, types, ids, tokenizers; and hosts that cannot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zebra.convert.families import understand
from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.hosts import choose, config_for, obstacles
from megatron_zebra.convert.kept import keep_tokenizer
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.to_hf import to_hf
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from tests.convert.models import SMALL, again, ids, make, ours, stored, theirs

W = 7
ZEBRA = {"layer_group_size": 4, "window_size": W}


@pytest.fixture(scope="module")
def zebra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers that became a Zebra at import."""
    folder = tmp_path_factory.mktemp("zebra")
    make(folder / "hf", "Llama", num_hidden_layers=5, max_position_embeddings=512)
    from_hf(folder / "hf", folder / "checkpoint", **ZEBRA)
    return folder / "checkpoint"


def arch_of(**config: Any) -> Architecture:
    return understand(Path("config.json"), {"model_type": "llama", **SMALL, **config}).architecture


@pytest.mark.parametrize("host", ["cwm", "mistral", "smollm3", "granite-swa"])
def test_W02_the_exported_window_sees_w_plus_1_keys(zebra: Path, tmp_path: Path, host: str) -> None:
    to_hf(zebra, tmp_path / "hf", form=host)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["sliding_window"] == W + 1
    assert architecture_of(tmp_path / "hf").window_size == W
    model = again(tmp_path / "hf")
    for attention in ("eager", *(["sdpa"] if host != "granite-swa" else [])):
        model.set_attn_implementation(attention)
        for length in (W, W + 1, W + 2, 3 * W):
            tokens = ids(length)
            assert (theirs(model, tokens) - ours(zebra, tokens)).abs().max() < 1e-4


def test_W04_layer_types_are_written_out(zebra: Path, tmp_path: Path) -> None:
    to_hf(zebra, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == "cwm"
    assert config["layer_types"] == ["full_attention", *["sliding_attention"] * 3, "full_attention"]


@pytest.mark.parametrize("host", ["cwm", "mistral", "smollm3"])
def test_generation_with_a_cache_equals_recomputation(zebra: Path, tmp_path: Path, host: str) -> None:
    to_hf(zebra, tmp_path / "hf", form=host)
    model = again(tmp_path / "hf")
    prompt = ids(3 * W)
    mask = torch.ones_like(prompt)[None]  # else transformers takes tokens that equal pad_token_id for padding
    settings = {"max_new_tokens": 3 * W, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    out = model.generate(prompt[None], attention_mask=mask, **settings)[0]
    for end in range(len(prompt), len(out)):
        assert int(theirs(model, out[:end])[-1].argmax()) == int(out[end])
        assert int(ours(zebra, out[:end])[-1].argmax()) == int(out[end])


def test_shards_and_their_index_are_what_safetensors_and_transformers_read(zebra: Path, tmp_path: Path) -> None:
    to_hf(zebra, tmp_path / "hf", max_shard_size=30_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors = stored(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert (theirs(again(tmp_path / "hf"), ids()) - ours(zebra, ids())).abs().max() < 1e-4
    assert torch.equal(ours(tmp_path / "hf", ids()), ours(zebra, ids()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_once_and_is_said(zebra: Path, tmp_path: Path, dtype: str) -> None:
    to_hf(zebra, tmp_path / "hf", dtype=dtype)
    tensors, kind = stored(tmp_path / "hf"), getattr(torch, dtype)
    source = open_model(zebra)
    assert torch.equal(tensors["model.embed_tokens.weight"].flatten(), source.read_tensor("embedding.weight").to(kind))
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == dtype
    assert again(tmp_path / "hf").dtype == kind


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values too large for float16"):
        to_hf(tmp_path / "hf", tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_each_weight_keeps_its_type(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "Llama").to(torch.bfloat16)
    model.model.norm.float()
    from safetensors.torch import save_model

    save_model(model, str(tmp_path / "hf/model.safetensors"))
    from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "out")
    assert before["model.norm.weight"].dtype == torch.float32
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_files_beside_the_weights_come_out_byte_for_byte(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama")
    kept = {
        "tokenizer_config.json": '{"tokenizer_class": "X",  "added_tokens_decoder": {"60": {}}}',
        "chat_template.jinja": "{{ messages }}\n\n",
        "special_tokens_map.json": "{ }",
        "merges.txt": "a b\r\n",
        "generation_config.json": '{"eos_token_id": [1, 9],   "temperature": 0.6}',
        "LICENSE": "free\n",
    }
    for name, text in kept.items():
        (tmp_path / "hf" / name).write_bytes(text.encode())
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(
        json.dumps(config | {"eos_token_id": [1, 9], "bos_token_id": 5, "pad_token_id": 3})
    )
    from_hf(tmp_path / "hf", tmp_path / "checkpoint", **ZEBRA)
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert [written[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")] == [[1, 9], 5, 3]
    assert (tmp_path / "checkpoint/huggingface/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_bare_sentencepiece_model_becomes_a_tokenizer_of_transformers(tmp_path: Path, model: str) -> None:
    import sentencepiece
    import transformers

    from megatron_zebra.data.tokenizer import load_tokenizer

    words = ["the cat sat on the mat", "a window of keys", "zebra stripes are global and local", "x = [1, 2, 3]"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "t"), vocab_size=300, model_type=model, pad_id=3,
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    make(tmp_path / "hf", "Llama", vocab_size=300)
    notes = to_hf(tmp_path / "hf", tmp_path / "out", tokenizer=tmp_path / "t.model", form="cwm")
    assert notes == []
    mine, other = load_tokenizer(tmp_path / "t.model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat  on the mat", " zebra\n\tkeys", "日本 x = [9]"):
        assert other(text, add_special_tokens=False).input_ids == mine.encode(text)
        assert other.decode(mine.encode(text)) == text
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == other.eos_token_id == mine.eod_id == 2
    # The same of a run that was trained with it.
    from_hf(tmp_path / "hf", tmp_path / "origin", **ZEBRA)
    shutil.copytree(tmp_path / "origin", tmp_path / "run", ignore=shutil.ignore_patterns("huggingface"))
    keep_tokenizer(tmp_path / "t.model", tmp_path / "run")
    assert not [note for note in to_hf(tmp_path / "run", tmp_path / "again") if "token" in note]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 2
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 2


def test_ids_that_nobody_knows_are_said_and_never_those_of_another_tokenizer(zebra: Path, tmp_path: Path) -> None:
    shutil.copytree(zebra, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("huggingface"))
    notes = to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert any("no tokenizer" in note for note in notes)
    assert any("eos_token_id is not known" in note for note in notes)
    assert again(tmp_path / "out").config.eos_token_id == -1


def test_hosts_say_what_they_cannot_express() -> None:
    plain, local = arch_of(), arch_of(self_attn_type="mix", window_size=3, layer_group_size=2)
    assert choose(plain, None) == "llama"
    assert choose(local, None) == "cwm"
    assert choose(replace(local, qkv_bias=True), None) == "qwen2"
    assert choose(replace(local, qk_norm=True), None) == "qwen3"
    assert choose(replace(local, nope_layers=(1,)), None) == "smollm3"
    assert choose(replace(local, hidden_size=30), None) == "mistral"
    theta = local.rope["local"].model_copy(update={"theta": 500.0})
    by_kind = replace(local, rope=local.rope | {"local": theta})
    assert choose(by_kind, None) == "granite-swa"
    assert choose(replace(plain, rope=plain.rope | {"local": theta}), None) == "llama"  # no layer uses it
    with pytest.raises(
        UserError, match="--format llama: cannot have local layers; cwm, mistral, smollm3, granite-swa can"
    ):
        choose(local, "llama")
    with pytest.raises(UserError, match="always has a bias on q, k and v, this model has not"):
        choose(plain, "qwen2")
    with pytest.raises(UserError, match="known are llama, cwm"):
        choose(plain, "gpt2")
    scaled = theta.model_copy(update={"scaling": "linear", "factor": 2.0})
    assert obstacles(replace(local, rope=local.rope | {"local": scaled}), "granite-swa")
    with pytest.raises(UserError, match="no architecture of transformers can express this model"):
        choose(replace(by_kind, qkv_bias=True), None)


def test_both_forms_of_rope_are_written_for_both_versions_of_transformers() -> None:
    arch = arch_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    config = config_for(arch, "llama", 96)
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 4.0})
    assert config["max_position_embeddings"] == 96


def test_nothing_is_left_of_an_export_that_fails(zebra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_zebra.checkpoint import files

    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="1,000 are free"):
        to_hf(zebra, tmp_path / "out")
    monkeypatch.undo()

    def full(file: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        to_hf(zebra, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
