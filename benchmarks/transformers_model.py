"""transformers' CWM with the weights of one of our models: the independent implementation that we are compared with."""

from typing import Any

from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder

RENAMED = (
    ("embedding.", "embed_tokens."),
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attention.", "self_attn."),
)


def transformers_cwm(arch: Architecture, model: Decoder, attention: str, rope: dict[str, Any] | None = None) -> Any:
    """CWM with its own windows, RoPE and masks. ``attention``: eager or sdpa; ``rope``: transformers' rope_parameters."""
    from transformers import CwmConfig, CwmForCausalLM

    config = CwmConfig(  # type: ignore[call-arg]  # takes what any configuration takes
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        rms_norm_eps=arch.norm_eps,
        sliding_window=arch.window_size + 1,
        layer_types=["full_attention" if kind == "global" else "sliding_attention" for kind in arch.layer_kinds],
        rope_parameters=rope or {"rope_type": "default", "rope_theta": arch.rope["global"].theta},
        max_position_embeddings=131072,
        tie_word_embeddings=arch.tie_embeddings,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation=attention,
    )
    theirs = CwmForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(
        {their_name(n): v for n, v in model.state_dict().items()}, strict=False
    )
    assert not missing, missing
    assert not unexpected, unexpected
    return theirs


def their_name(name: str) -> str:
    """A parameter's name in transformers' Llama-type models."""
    if name == "head.weight":
        return "lm_head.weight"
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return f"model.{name}"
