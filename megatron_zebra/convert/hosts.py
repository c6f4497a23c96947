"""The architectures of transformers that can carry a model out, what each can express, and its config.json. Pure.

None needs code of its own: stock programs load what is written here. A host's window counts the query's own key: w + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_zebra.config.sections import Rope
from megatron_zebra.convert.rope_config import write_rope
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import LayerKind

MEANING = {
    "local": "local layers",
    "bias": "a bias on q, k and v",
    "qk_norm": "RMSNorm on q and k",
    "nope": "layers without RoPE",
    "rope": "another RoPE in local layers",
}
GRANITE = "granite-swa"


@dataclass(frozen=True)
class Host:
    """What a host can have, what it always has, and its own keys. ``divides``: transformers wants hidden_size / num_heads whole."""

    model_type: str
    class_name: str
    own: Callable[[Architecture], dict[str, Any]]
    allows: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    divides: bool = False


def config_for(arch: Architecture, name: str, max_length: int) -> dict[str, Any]:
    """config.json of ``arch`` as host ``name``, without dtype and special ids."""
    host = HOSTS[name]
    ropes = used_ropes(arch)
    parameters = write_rope(ropes.get("global") or ropes["local"], arch.head_dim)
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        "architectures": [host.class_name],
        "model_type": host.model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "max_position_embeddings": max_length,
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
        "initializer_range": 0.02,
        "use_cache": True,
        "attention_dropout": 0.0,
        **host.own(arch),
    }


def choose(arch: Architecture, name: str | None) -> str:
    """The host ``name``, or the first that can carry ``arch``; UserError with the reasons if it cannot."""
    able = [other for other in HOSTS if not obstacles(arch, other)]
    if name is None:
        if not able:
            reasons = "; ".join(f"{other} {' and '.join(obstacles(arch, other))}" for other in HOSTS)
            raise UserError(f"no architecture of transformers can express this model: {reasons}")
        return able[0]
    if name not in HOSTS:
        raise UserError(f"--format {name}: known are {', '.join(HOSTS)}")
    if why := obstacles(arch, name):
        others = f"; {', '.join(able)} can" if able else ""
        raise UserError(f"--format {name}: {' and '.join(why)}{others}")
    return name


def obstacles(arch: Architecture, name: str) -> list[str]:
    """Why host ``name`` cannot carry ``arch``, in words that follow its name; empty if it can."""
    host, has = HOSTS[name], features(arch)
    found = [f"cannot have {MEANING[feature]}" for feature in MEANING if feature in has - host.allows - host.always]
    found += [
        f"always has {MEANING[feature]}, this model has not" for feature in MEANING if feature in host.always - has
    ]
    if host.divides and arch.hidden_size % arch.num_heads:
        found.append(f"needs hidden_size = {arch.hidden_size} to be a multiple of num_heads = {arch.num_heads}")
    if name == GRANITE and len({_but_theta(rope, arch.head_dim) for rope in used_ropes(arch).values()}) > 1:
        found.append("can change theta by kind of layer, but no other part of RoPE")
    return found


def features(arch: Architecture) -> set[str]:
    """What of MEANING the model has."""
    ropes = [write_rope(rope, arch.head_dim) for rope in used_ropes(arch).values()]
    has = {
        "local": "local" in arch.layer_kinds,
        "bias": arch.qkv_bias,
        "qk_norm": arch.qk_norm,
        "nope": bool(arch.nope_layers),
        "rope": len(ropes) == 2 and ropes[0] != ropes[1],
    }
    return {feature for feature, there in has.items() if there}


def used_ropes(arch: Architecture) -> dict[LayerKind, Rope]:
    """RoPE of the kinds of layer that there are."""
    return {kind: rope for kind, rope in arch.rope.items() if kind in arch.layer_kinds}


def layer_types(arch: Architecture) -> list[str]:
    """The pattern in transformers' words."""
    return ["full_attention" if kind == "global" else "sliding_attention" for kind in arch.layer_kinds]


def hf_window(arch: Architecture) -> int:
    """transformers' sliding_window counts the query's own key."""
    return arch.window_size + 1


def _but_theta(rope: Rope, head_dim: int) -> str:
    return repr(sorted((k, v) for k, v in write_rope(rope, head_dim).items() if k != "rope_theta"))


def _llama(arch: Architecture) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


def _cwm(arch: Architecture) -> dict[str, Any]:
    return {"sliding_window": hf_window(arch), "layer_types": layer_types(arch), "mlp_bias": False, "pretraining_tp": 1}


def _mistral(arch: Architecture) -> dict[str, Any]:
    kinds = set(arch.layer_kinds)
    if kinds == {"global"}:
        return {"sliding_window": None}
    # With layer_types the Auto classes take it for a Ministral; without, every layer slides.
    return {"sliding_window": hf_window(arch)} | ({"layer_types": layer_types(arch)} if len(kinds) == 2 else {})


def _qwen(arch: Architecture) -> dict[str, Any]:
    local = "local" in arch.layer_kinds
    first = arch.layer_kinds.index("local") if local else arch.num_layers
    return {
        "use_sliding_window": local,
        "sliding_window": hf_window(arch) if local else None,
        "max_window_layers": first,  # the layers before it are full, for programs that do not know layer_types
        "layer_types": layer_types(arch),
    }


def _qwen3(arch: Architecture) -> dict[str, Any]:
    return _qwen(arch) | {"attention_bias": False}


def _smollm3(arch: Architecture) -> dict[str, Any]:
    local = "local" in arch.layer_kinds
    return {
        "use_sliding_window": local,
        "sliding_window": hf_window(arch) if local else None,
        "layer_types": layer_types(arch),
        "no_rope_layers": [int(i not in arch.nope_layers) for i in range(arch.num_layers)],
        "attention_bias": False,
        "mlp_bias": False,
    }


def _granite(arch: Architecture) -> dict[str, Any]:
    thetas = {kind: write_rope(rope, arch.head_dim)["rope_theta"] for kind, rope in used_ropes(arch).items()}
    return {
        "sliding_window": hf_window(arch),
        "layer_types": layer_types(arch),
        "layer_rope_theta": [0 if i in arch.nope_layers else thetas[kind] for i, kind in enumerate(arch.layer_kinds)],
        "attention_multiplier": arch.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    }


# In order of preference: a program that knows few of them is likelier to know the first.
HOSTS: dict[str, Host] = {
    "llama": Host("llama", "LlamaForCausalLM", _llama, divides=True),
    "cwm": Host("cwm", "CwmForCausalLM", _cwm, frozenset({"local"}), divides=True),
    "mistral": Host("mistral", "MistralForCausalLM", _mistral, frozenset({"local"})),
    "qwen2": Host("qwen2", "Qwen2ForCausalLM", _qwen, frozenset({"local"}), frozenset({"bias"})),
    "qwen3": Host("qwen3", "Qwen3ForCausalLM", _qwen3, frozenset({"local"}), frozenset({"qk_norm"})),
    "smollm3": Host("smollm3", "SmolLM3ForCausalLM", _smollm3, frozenset({"local", "nope"})),
    GRANITE: Host("granite_swa", "GraniteSWAForCausalLM", _granite, frozenset({"local", "nope", "rope"})),
}
