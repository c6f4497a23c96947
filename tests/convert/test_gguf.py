"""GGUF files written by the gguf package, as llama.cpp's converter permutes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.gguf_file import read_header
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.to_hf import to_hf
from megatron_zebra.errors import UserError
from tests.convert.models import SMALL, again, ids, make, ours, stored, theirs

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the pairs that RoPE turns lie beside each other."""
    out = np.empty_like(rows)
    dim = len(rows) // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = rows[head * dim + i]
            out[head * dim + 2 * i + 1] = rows[head * dim + dim // 2 + i]
    return out


def write(file: Path, tensors: dict[str, torch.Tensor], quantise: Any = None, skip: str = "", **more: Any) -> None:
    """``tensors`` (transformers' names) as a GGUF file of a Llama."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(SMALL["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(SMALL["hidden_size"])
    writer.add_feed_forward_length(SMALL["intermediate_size"])
    writer.add_head_count(SMALL["num_attention_heads"])
    writer.add_head_count_kv(SMALL["num_key_value_heads"])
    writer.add_key_length(SMALL["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"t{i}" for i in range(SMALL["vocab_size"])])
    writer.add_eos_token_id(2)
    for key, value in more.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        values = tensor.numpy()
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "attn_q" in name or "attn_k" in name:
            values = permuted(values, SMALL["num_attention_heads" if "attn_q" in name else "num_key_value_heads"])
        if name == skip:
            continue
        if quantise is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_q_and_k_rows_are_put_back_so_that_logits_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    model = make(tmp_path / "hf", "Llama", tie_word_embeddings=tied)
    tensors = stored(tmp_path / "hf")
    write(tmp_path / "model.gguf", tensors)
    assert (ours(tmp_path / "model.gguf", ids()) - theirs(model, ids())).abs().max() < 1e-4
    notes = from_hf(tmp_path / "model.gguf", tmp_path / "checkpoint")
    assert any("no tokenizer files were made" in note for note in notes)  # its made-up vocabulary is none
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    out = stored(tmp_path / "out")
    assert out.keys() == tensors.keys()
    assert all(torch.equal(out[name], tensors[name]) for name in tensors)
    loaded = again(tmp_path / "out")
    assert loaded.config.eos_token_id == 2
    assert architecture_of(tmp_path / "model.gguf").max_length == 64


def test_quantised_tensors_become_the_fp32_numbers_they_stand_for(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama")
    tensors, kind = stored(tmp_path / "hf"), gguf.GGMLQuantizationType.Q8_0
    write(tmp_path / "model.gguf", tensors, kind)
    source = open_model(tmp_path / "model.gguf")
    for ours_, name in (
        ("layers.1.attention.v_proj.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("head.weight", "lm_head.weight"),
    ):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name].numpy(), kind), kind)
        assert source.dtype(ours_) == "float32"
        assert np.array_equal(source.read_tensor(ours_).numpy(), expected.reshape(-1))
        assert np.array_equal(
            source.read_tensor(ours_, flat_start=40, flat_numel=50).numpy(), expected.reshape(-1)[40:90]
        )


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama")
    tensors, file = stored(tmp_path / "hf"), tmp_path / "model.gguf"

    def problem() -> str:
        with pytest.raises(UserError) as error:
            open_model(file)
        assert "\n" not in str(error.value)
        return str(error.value)

    file.write_bytes(b"something else")
    assert "not a GGUF file" in problem()
    write(file, tensors)
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    assert "its header ends too early" in problem()
    for key, value, words in (
        ("general.alignment", 0, "its header ends too early"),
        ("general.alignment", 0.5, "its header ends too early"),
        ("llama.embedding_length", "wide", "hidden_size is 'wide'"),
        ("llama.attention.layer_norm_rms_epsilon", "small", "not those of a model"),
    ):
        write(file, tensors, **{key.replace(".", "__"): value})
        assert words in problem()
    far = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4  # where that tensor begins
    file.write_bytes(whole[:far] + b"\xff" * 8 + whole[far + 8 :])
    assert "output_norm.weight begins after them" in problem()
    file.write_bytes(whole[:-5000])
    assert "cut: " in problem()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        from_hf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(file, tensors, skip="blk.1.ffn_up.weight")
    assert "tensors are missing that config.json asks for: model.layers.1.mlp.up_proj.weight" in problem()
    write(file, tensors | {"rope_freqs.weight": torch.ones(8)})
    assert "table of factors" in problem()
    write(file, tensors, llama__rope__dimension_count=8)
    assert "RoPE turns all of a head" in problem()


def test_scaling_of_rope_is_read(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama")
    scaling = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__original_context_length": 16,
    }
    write(tmp_path / "model.gguf", stored(tmp_path / "hf"), **scaling)
    rope = architecture_of(tmp_path / "model.gguf").rope["global"]
    assert (rope.scaling, rope.factor, rope.original_length) == ("yarn", 4.0, 16)


def test_the_header_is_that_of_the_gguf_package(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Llama")
    write(tmp_path / "model.gguf", stored(tmp_path / "hf"), llama__odd=[1.5, 2.5], llama__flag=True)
    header, reader = read_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    for key, value in header.values.items():
        assert reader.fields[key].contents() == value
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (list(found.shape), found.type, found.start) == (
            [int(n) for n in tensor.shape][::-1],
            int(tensor.tensor_type),
            int(tensor.data_offset),
        )
