"""What each family's config.json means: against transformers' own models, defaults and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zebra.convert.families import understand
from megatron_zebra.convert.folder import architecture_of, read_config
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.hosts import HOSTS, layer_types, obstacles
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.to_hf import to_hf
from megatron_zebra.errors import UserError
from tests.convert.models import FAMILIES, again, family, ids, ours, stored, theirs

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 8}


def kinds(name: str, **config: Any) -> str:
    """G and l of what the config.json of a model of 8 layers means."""
    arch = understand(Path("config.json"), {"model_type": name, **TINY, **config}).architecture
    return "".join("G" if kind == "global" else "l" for kind in arch.layer_kinds)


def problem(name: str, **config: Any) -> str:
    with pytest.raises(UserError) as error:
        understand(Path("config.json"), {"model_type": name, **TINY, **config})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_V01_V02_in_and_out_every_logit_and_bit(name: str, tmp_path: Path) -> None:
    """From every family to every host that can carry it: logits of stock transformers, tensors bit for bit, the same model."""
    model, tokens = family(tmp_path / "hf", name), ids()
    expected = theirs(model, tokens)
    assert (ours(tmp_path / "hf", tokens) - expected).abs().max() < 1e-4
    assert from_hf(tmp_path / "hf", tmp_path / "checkpoint") == []
    assert torch.equal(ours(tmp_path / "checkpoint", tokens), ours(tmp_path / "hf", tokens))
    arch = open_model(tmp_path / "checkpoint").architecture
    able = [host for host in HOSTS if not obstacles(arch, host)]
    assert able
    for host in able:
        to_hf(tmp_path / "checkpoint", tmp_path / host, form=host)
        loaded = again(tmp_path / host)
        assert (theirs(loaded, tokens) - expected).abs().max() < 1e-4
        assert ("lm_head.weight" in stored(tmp_path / host)) is not arch.tie_embeddings
        for tensor, values in stored(tmp_path / host).items():
            assert "sinks" in tensor or torch.equal(values, stored(tmp_path / "hf")[tensor])
        assert architecture_of(tmp_path / host) == arch
        assert read_config(tmp_path / host).unknown == []


@pytest.mark.parametrize("name", ["llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "cwm", "granite_swa"])
def test_what_a_file_leaves_out_is_what_transformers_takes(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(name)
    config_json = {"model_type": name} | ({"attention_multiplier": 128**-0.5} if name == "granite_swa" else {})
    arch = understand(Path("config.json"), config_json).architecture
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert arch.hidden_size == config.hidden_size
    assert arch.head_dim == head_dim
    assert (arch.num_heads, arch.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (arch.ffn_hidden_size, arch.vocab_size) == (config.intermediate_size, config.vocab_size)
    assert (arch.norm_eps, arch.tie_embeddings) == (config.rms_norm_eps, config.tie_word_embeddings)
    assert (arch.num_layers, arch.max_length) == (config.num_hidden_layers, config.max_position_embeddings)
    assert arch.rope["global"].theta == config.rope_parameters["rope_theta"]
    assert arch.rope["global"].scaling == config.rope_parameters["rope_type"].replace("default", "none")
    if types := getattr(config, "layer_types", None):
        assert layer_types(arch) == types
    elif name != "llama":
        assert set(arch.layer_kinds) == {"local"}
    if "local" in arch.layer_kinds:
        assert arch.window_size == config.sliding_window - 1
    rotated = getattr(config, "no_rope_layers", [1] * arch.num_layers)
    assert arch.nope_layers == tuple(i for i, flag in enumerate(rotated) if not flag)


def test_W01_a_sliding_window_of_W_is_a_window_of_W_minus_1() -> None:
    arch = understand(Path("config.json"), {"model_type": "mistral", **TINY, "sliding_window": 9}).architecture
    assert arch.window_size == 8
    zebra = {"model_type": "llama", **TINY, "self_attn_type": "mix", "window_size": 8, "layer_group_size": 4}
    assert understand(Path("config.json"), zebra).architecture.window_size == 8
    assert "sliding_window is 1; a whole number from 2" in problem("mistral", sliding_window=1)


def test_W04_which_end_of_the_stack_slides() -> None:
    assert kinds("qwen2", use_sliding_window=True, max_window_layers=6) == "GGGGGGll"
    assert kinds("qwen2", use_sliding_window=False, max_window_layers=6) == "GGGGGGGG"
    assert kinds("qwen3", use_sliding_window=True, max_window_layers=0) == "llllllll"
    assert kinds("cwm") == "GlllGlll"
    assert kinds("llama", self_attn_type="mix", window_size=4, layer_group_size=4) == "GlllGlll"
    assert kinds("llama", self_attn_type="sparse", window_size=4) == "llllllll"
    assert kinds("llama", self_attn_type="full", window_size=4, layer_group_size=4) == "GGGGGGGG"


def test_nested_rope_is_read_by_kind_of_layer() -> None:
    nested = {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    arch = understand(Path("c"), {"model_type": "cwm", **TINY, "rope_parameters": nested}).architecture
    assert (arch.rope["global"].scaling, arch.rope["global"].theta) == ("yarn", 5e5)
    assert (arch.rope["local"].scaling, arch.rope["local"].theta) == ("none", 1e4)


def test_keys_that_nobody_knows_are_listed() -> None:
    said = {
        "model_type": "llama",
        **TINY,
        "use_magic": True,
        "rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1},
    }
    found = understand(Path("config.json"), {**said, "torch_dtype": "bfloat16", "unheard_of": None})
    assert found.unknown == ["use_magic", "rope_parameters.odd"]


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("olmo2", {}, "normalise what attention and MLP give"),
        ("olmo3", {}, "normalise what attention and MLP give"),
        ("mixtral", {}, "mixtures of experts"),
        ("bert", {}, "known are llama, mistral"),
        (None, {}, "known are llama, mistral"),
        ("llama", {"attention_bias": True}, "attention_bias is True; here only q, k and v"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "SwiGLU"),
        ("llama", {"sliding_window": 8}, "no window in transformers"),
        ("llama", {"layer_types": ["sliding_attention"] * 8}, "attends to everything"),
        ("llama", {"partial_rotary_factor": 0.5}, "all of a head"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "all of a head"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "known here are default, linear"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters.factor is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "1 or more"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "rounds the bounds"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "leave out"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
        ("llama", {"final_logit_softcapping": 30.0}, "nothing is scaled or capped"),
        ("llama", {"hidden_size": "many"}, "a whole number from 1"),
        ("llama", {"hidden_size": True}, "a whole number from 1"),
        ("llama", {"num_key_value_heads": 3}, "no multiple"),
        ("llama", {"head_dim": 7}, "in pairs"),
        ("llama", {"rms_norm_eps": 0}, "a number above 0"),
        ("llama", {"tie_word_embeddings": "yes"}, "true or false"),
        ("llama", {"self_attn_type": "odd"}, "mix, full, sparse"),
        ("llama", {"self_attn_type": "mix", "layer_group_size": 4}, "window_size is missing"),
        ("cwm", {"layer_types": ["full_attention"]}, "each of the 8 layers"),
        ("cwm", {"layer_types": ["chunked_attention"] * 8}, "is not one of full_attention, sliding_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 8}, "use_sliding_window is false"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("granite_swa", {}, "head_dim^-0.5"),
        ("granite_swa", {"attention_multiplier": 8**-0.5, "logits_scaling": 8.0}, "nothing is scaled"),
        ("granite_swa", {"attention_multiplier": 8**-0.5, "layer_rope_theta": [1e4, 2e4] * 4}, "one theta for all local"),
    ],
)  # fmt: skip
def test_what_the_other_side_computes_otherwise_is_refused(name: str, config: dict[str, Any], words: str) -> None:
    assert words in problem(name, **config)


def test_understanding_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    code = (
        "import sys; from pathlib import Path; from megatron_zebra.convert.folder import architecture_of; "
        f"architecture_of(Path({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
