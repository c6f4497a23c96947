"""Tables of config.json's keys: what transformers takes for those that are not there, and which must have which value. Pure."""

from typing import Any

COMMON: dict[str, Any] = {
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": None, "head_dim": None,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
LLAMA: dict[str, Any] = {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
MISTRAL: dict[str, Any] = {
    "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
    "sliding_window": 4096,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
SMOLLM3: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "no_rope_layer_interval": 4,
}  # fmt: skip
CWM: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 6144, "intermediate_size": 21504, "num_hidden_layers": 64,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "sliding_window": 8192,
}  # fmt: skip
CWM_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GRANITE_SWA: dict[str, Any] = {
    "vocab_size": 100352, "hidden_size": 2560, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 20, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "sliding_window": 128, "tie_word_embeddings": True, "attention_multiplier": 1.0, "layer_rope_theta": None,
}  # fmt: skip

_POST_NORM = "its blocks normalise what attention and MLP give, not what they take, and q and k over all heads at once"
_EXPERTS = "its MLPs are mixtures of experts"
_GEMMA = "it scales the embedding, adds 1 to the weights of its norms, and its MLP has GELU"
REFUSED = {
    "olmo2": _POST_NORM, "olmo3": _POST_NORM, "olmo": "its norms have no weights", "mixtral": _EXPERTS, "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS, "gpt_oss": _EXPERTS + " and its attention has sinks", "gemma": _GEMMA, "gemma2": _GEMMA,
    "gemma3_text": _GEMMA, "granite": "it multiplies embedding, residuals and logits by constants",
    "cohere2": "attention and MLP run beside each other, under one LayerNorm", "phi3": "its projections are fused and partly rotated",
    "gpt2": "it has learned positions and no RoPE",
}  # fmt: skip

_NO_BIAS = "here only q, k and v can have a bias (and only in qwen2)"
_PLAIN = "nothing is scaled or capped here"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the MLP here has silu (SwiGLU)"),
    "attention_bias": ((False,), _NO_BIAS),
    "mlp_bias": ((False,), _NO_BIAS),
    "partial_rotary_factor": ((1,), "here RoPE turns all of a head"),
    "rope_interleaved": ((False,), "here RoPE turns the pairs (i, i + head_dim / 2)"),
    "use_mrope": ((False,), "here a token has one position"),
    "embedding_multiplier": ((1,), _PLAIN),
    "residual_multiplier": ((1,), _PLAIN),
    "logits_scaling": ((1,), _PLAIN),
    "logit_scale": ((1,), _PLAIN),
    "final_logit_softcapping": ((), _PLAIN),
    "attn_logit_softcapping": ((), _PLAIN),
    "query_pre_attn_scalar": ((), "attention is scaled by head_dim^-0.5 here"),
    "quantization_config": ((), "quantised weights are not read; save the model in bf16, fp16 or fp32 first"),
    "num_experts": ((0, 1), _EXPERTS),
    "num_local_experts": ((0, 1), _EXPERTS),
    "add_cross_attention": ((False,), "there is no cross-attention here"),
    "is_encoder_decoder": ((False,), "there is no encoder here"),
}
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled _name_or_path
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout
    id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length max_new_tokens min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id
    use_bfloat16 use_cache use_fsdp
    """.split()  # noqa: SIM905 (a list would be sixty lines)
)
