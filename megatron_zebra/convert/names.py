"""What the parameters are called elsewhere, and which shapes a folder must then hold. Pure; imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_THEIRS = (
    ("embedding.", "embed_tokens."),
    ("attention_norm.", "input_layernorm."),
    ("mlp_norm.", "post_attention_layernorm."),
    ("attention.", "self_attn."),
)
_GGUF = (
    ("attention_norm.", "attn_norm."),
    ("mlp_norm.", "ffn_norm."),
    ("attention.q_proj.", "attn_q."),
    ("attention.k_proj.", "attn_k."),
    ("attention.v_proj.", "attn_v."),
    ("attention.o_proj.", "attn_output."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("layers.", "blk."),
)
_GGUF_ENDS = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
MOST_NAMED = 3


def their_name(name: str) -> str:
    """A parameter's name in transformers' Llama-like models."""
    if name == "head.weight":
        return HEAD
    return "model." + _replaced(name, _THEIRS)


def gguf_name(name: str) -> str:
    """A parameter's name in a GGUF file."""
    return _GGUF_ENDS.get(name) or _replaced(name, _GGUF)


def sink_name(layer: int) -> str:
    """The attention sinks of a layer of GraniteSWA."""
    return f"model.layers.{layer}.self_attn.sinks"


def check_tensors(where: Path, arch: Architecture, found: Mapping[str, tuple[int, ...]], spare: set[str]) -> None:
    """Raise UserError unless ``found`` (name -> shape) is what config.json promises.

    Args:
        spare: names that may be there beside the parameters.
    """
    expected = {their_name(name): shape for name, shape in arch.parameter_shapes().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{where}: tensors are missing that config.json asks for: {some(missing)}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{where}: {name} has shape {list(found[name])}, by config.json it would be {list(shape)}")
    extra = [name for name in found.keys() - expected.keys() - spare if not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{where}: tensors that have no place in the model of config.json: {some(sorted(extra))}")


def some(names: list[str]) -> str:
    """The first of ``names``, and how many there are beside."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name
