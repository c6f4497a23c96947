"""The released Zebra format against a dense model written here, with a mask for each layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.from_hf import from_hf
from megatron_zebra.convert.to_hf import to_hf
from tests.convert.models import SMALL, again, ids, make, ours, stored, theirs

W, L, LENGTH = 8, 3, 60
Weights = dict[str, torch.Tensor]


def release(folder: Path, **config: Any) -> Path:
    """A folder as the release has it: a Llama's tensors, its config.json with keys of its own."""
    make(folder, "Llama", num_hidden_layers=7)
    said = {key: value for key, value in SMALL.items() if value is not None} | {
        "architectures": ["ZebraForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 7,
        "self_attn_type": "mix",
        "window_size": W,
        "layer_group_size": L,
        "use_fsdp": True,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
    }
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def dense(
    weights: Weights, tokens: torch.Tensor, full: list[bool], w: int, theta: float = 1e4, factor: float = 1.0
) -> Any:
    """Logits [T, V] in fp64 with a mask [T, T] for each layer: a local query at i sees keys i - w to i."""
    p = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv_heads, dim, length = (
        SMALL["num_attention_heads"],
        SMALL["num_key_value_heads"],
        SMALL["head_dim"],
        len(tokens),
    )
    back = torch.arange(length)[:, None] - torch.arange(length)
    angles = torch.arange(length).double()[:, None] / factor / theta ** (torch.arange(0, dim, 2).double() / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        y = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
        return torch.cat([y.real, y.imag], -1)

    x = p["model.embed_tokens.weight"][tokens]
    for i, everything in enumerate(full):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = ((h @ p[f"{at}.self_attn.{n}_proj.weight"].T).view(length, -1, dim) for n in "qkv")
        k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (rotated(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), k) / dim**0.5
        seen = (back >= 0) & (everything | (back <= w))
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        x = x + out.flatten(1) @ p[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ p[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ p[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ p["lm_head.weight"].T


@pytest.mark.parametrize(
    ("config", "full", "factor"),
    [
        ({}, [True, False, False] * 2 + [True], 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, [True, False, False] * 2 + [True], 2.0),
        ({"self_attn_type": "sparse"}, [False] * 7, 1.0),
        ({"self_attn_type": "full"}, [True] * 7, 1.0),
    ],
)
def test_W01_logits_equal_a_dense_model_with_w_plus_1_keys(
    tmp_path: Path, config: dict[str, Any], full: list[bool], factor: float
) -> None:
    folder, tokens = release(tmp_path / "release", **config), ids(LENGTH)
    weights = stored(folder)
    expected = dense(weights, tokens, full, W, factor=factor)
    assert (ours(folder, tokens) - expected).abs().max() < 1e-4
    if not all(full):
        for w in (W - 1, W + 1):
            assert (dense(weights, tokens, full, w, factor=factor) - expected).abs().max() > 0.01
    from_hf(folder, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert (theirs(again(tmp_path / "out"), tokens) - expected).abs().max() < 1e-4
    arch = architecture_of(tmp_path / "out")
    assert [kind == "global" for kind in arch.layer_kinds] == full
