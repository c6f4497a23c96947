"""What model a path holds, in words."""

from collections import Counter
from math import prod
from pathlib import Path

from megatron_zebra.config.sections import Rope
from megatron_zebra.convert.hosts import HOSTS, obstacles, used_ropes
from megatron_zebra.convert.safetensors import ITEM_BYTES
from megatron_zebra.convert.source import CheckpointSource, ForeignSource, open_model
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import stripes


def describe(path: Path) -> str:
    """A page on the model at ``path``; its tensors are looked for, not read."""
    source = open_model(path)
    arch = source.architecture
    lines = [f"{source.folder}"]
    if isinstance(source, CheckpointSource):
        checkpoint = source.checkpoint
        what = "weights alone" if checkpoint.kinds() == ["weight"] else f"with {', '.join(checkpoint.kinds())}"
        lines.append(
            f"  training checkpoint of step {checkpoint.step}, {what}, written by {checkpoint.world_size} ranks"
        )
        origin = checkpoint.metadata.get("source")
        if isinstance(origin, dict) and origin.get("family"):
            lines.append(f"  converted from a model of type {origin['family']}")
    elif isinstance(source, ForeignSource):
        lines.append(f"  model of type {source.family}")
    shapes = arch.parameter_shapes()
    dtypes: Counter[str] = Counter()
    for name, shape in shapes.items():
        dtypes[source.dtype(name)] += prod(shape)
    size = sum(ITEM_BYTES.get(dtype, 4) * count for dtype, count in dtypes.items())
    types = ", ".join(f"{dtype} ({count / sum(dtypes.values()):.0%})" for dtype, count in dtypes.most_common())
    lines.append(f"  {sum(dtypes.values()):,} parameters, {types}, {size / 1e9:.2f} GB")
    lines += _model(arch)
    lines.append("architectures of transformers that can carry it (to-hf --format):")
    for host in HOSTS:
        why = obstacles(arch, host)
        lines.append(f"  {host:12s} {'no: ' + ' and '.join(why) if why else 'yes'}")
    return "\n".join(lines + [f"warning: {note}" for note in source.notes])


def _model(arch: Architecture) -> list[str]:
    extras = [
        text
        for there, text in (
            (arch.tie_embeddings, "tied embedding"),
            (arch.qkv_bias, "bias on q, k and v"),
            (arch.qk_norm, "RMSNorm on q and k"),
        )
        if there
    ]
    lines = [
        f"  hidden {arch.hidden_size}, MLP {arch.ffn_hidden_size}, heads {arch.num_heads} of {arch.head_dim} (KV {arch.num_kv_heads}), "
        f"vocabulary {arch.vocab_size}" + "".join(f", {extra}" for extra in extras),
        f"  meant for sequences of up to {arch.max_length or '(unknown)'} tokens",
        stripes(arch.layer_kinds, arch.window_size),
    ]
    lines += [f"  RoPE of {kind} layers: {_rope(rope)}" for kind, rope in used_ropes(arch).items()]
    if arch.nope_layers:
        lines.append(f"  without RoPE: layers {', '.join(map(str, arch.nope_layers))}")
    return lines


def _rope(rope: Rope) -> str:
    text = f"theta {rope.theta:g}"
    if rope.scaling == "none":
        return text
    text += f", {rope.scaling} by {rope.factor:g}"
    if rope.original_length and rope.scaling != "linear":
        text += f" from {rope.original_length} tokens"
    return text + (f", frozen for {rope.length} tokens" if rope.scaling == "dynamic" else "")
