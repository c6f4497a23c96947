"""Small random models of transformers, one a family, saved as folders; and logits of both sides."""

from pathlib import Path
from typing import Any

import torch

from megatron_zebra.attention.contract import Segments
from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import ModelSource, open_model

LENGTH = 80
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama-kv8": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None, "rope_parameters": YARN}),
    "ministral": ("Ministral", {"sliding_window": 8, "layer_types": MIXED}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "rope_parameters": YARN},
    ),
    "qwen2-full": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}),
    "qwen3-full": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1, 0, 1]}),
    "cwm": ("Cwm", {"sliding_window": 8, "rope_parameters": LLAMA3}),
    "granite-swa": (
        "GraniteSWA",
        {"sliding_window": 8, "layer_rope_theta": [1e4, 500.0, 500.0, 500.0, 1e4], "attention_multiplier": 0.25},
    ),
}


def make(folder: Path, model: str, seed: int = 0, **config: Any) -> Any:
    """A model of class ``model`` with random weights, norms and biases too, saved in ``folder``."""
    import transformers

    torch.manual_seed(seed)
    made = getattr(transformers, f"{model}Config")(**SMALL | config)
    theirs = getattr(transformers, f"{model}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "sinks" in name:
                param.fill_(-1e9)
            elif param.dim() == 1:
                param.add_(torch.empty_like(param).normal_(0, 0.3))
    theirs.save_pretrained(folder)
    return theirs


def family(folder: Path, name: str) -> Any:
    model, config = FAMILIES[name]
    return make(folder, model, **config)


def ids(length: int = LENGTH, seed: int = 0, vocabulary: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def theirs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of transformers, without a cache."""
    return model(tokens[None], use_cache=False).logits[0]


@torch.no_grad()
def ours(source: ModelSource | Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of our decoder."""
    opened = open_model(source) if isinstance(source, Path) else source
    model = load_decoder(opened, torch.device("cpu"), torch.float32)
    return model(tokens, torch.arange(len(tokens)), Segments.from_lengths([len(tokens)]))


def again(folder: Path) -> Any:
    """What stock transformers make of a folder."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's safetensors files, read by the safetensors package."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
