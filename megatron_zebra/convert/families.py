"""The families that can be read: what each one's config.json means as an Architecture. Pure; imports no torch.

A key that the file leaves out has the value that transformers gives it. A key whose value would make the other side compute
something else is refused with the reason; a key that nobody here knows is reported, never dropped in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_zebra.config.sections import Model
from megatron_zebra.convert.family_keys import (
    COMMON,
    CWM,
    CWM_ROPE,
    GRANITE_SWA,
    HARMLESS,
    LLAMA,
    MISTRAL,
    NEUTRAL,
    QWEN2,
    REFUSED,
    SMOLLM3,
)
from megatron_zebra.convert.rope_config import KINDS, read_rope
from megatron_zebra.convert.values import Values
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import LayerKind, layer_kinds

Layers = tuple[tuple[LayerKind, ...], int | None]
"""The kind of each layer, and w where there is a window."""


@dataclass(frozen=True)
class Understood:
    """What a config.json says."""

    architecture: Architecture
    family: str
    unknown: list[str]
    sinks: bool = False


@dataclass(frozen=True)
class Family:
    """How one model_type is read. ``defaults``: what transformers takes for keys that are not there."""

    layers: Callable[[Values, int], Layers]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    qkv_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False


def understand(file: Path, raw: Mapping[str, Any]) -> Understood:
    """The Architecture of a config.json's content ``raw``; UserError naming ``file`` and the key otherwise."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise UserError(f"{file}: model_type is {name!r}; known are {', '.join(FAMILIES)}")
    if name in REFUSED:
        raise UserError(f"{file}: model_type {name!r} cannot be expressed here: {REFUSED[name]}")
    if name not in FAMILIES:
        raise UserError(f"{file}: model_type {name!r} is not known here; known are {', '.join(FAMILIES)}")
    name = "zebra" if name == "llama" and raw.get("self_attn_type") is not None else name
    family = ZEBRA if name == "zebra" else FAMILIES[name]
    values = Values(file, raw, {**COMMON, **family.defaults})
    _refuse(values)
    layers = values.whole("num_hidden_layers")
    hidden, heads = values.whole("hidden_size"), values.whole("num_attention_heads")
    kv_heads = values.whole("num_key_value_heads") if values.get("num_key_value_heads") is not None else heads
    head_dim = values.whole("head_dim") if values.get("head_dim") is not None else hidden // heads
    if heads % kv_heads:
        raise values.error("num_key_value_heads", f"num_attention_heads = {heads} is no multiple of it")
    if head_dim % 2 or not head_dim:
        raise values.error("head_dim", f"heads of {head_dim} dimensions cannot be turned in pairs by RoPE")
    kinds, window = family.layers(values, layers)
    rope, unknown = read_rope(values, family.rope)
    rope, nope = _own_ropes(values, rope, kinds)
    longest = values.whole("max_position_embeddings")
    if family.sinks and values.number("attention_multiplier") != head_dim**-0.5:
        raise values.error("attention_multiplier", f"attention is scaled by head_dim^-0.5 = {head_dim**-0.5!r} here")
    architecture = Architecture(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=values.whole("intermediate_size"),
        vocab_size=values.whole("vocab_size", least=2),
        layer_kinds=kinds,
        window_size=window or Model().window_size,
        rope=rope,
        tie_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=values.number("rms_norm_eps"),
        nope_layers=nope,
        max_length=max([longest, *(r.length for r in rope.values() if r.length)]),
    )
    return Understood(architecture, name, values.unread(HARMLESS) + unknown, family.sinks)


def _refuse(values: Values) -> None:
    for key, (allowed, why) in NEUTRAL.items():
        value = values.get(key)
        if (
            key in values.raw
            and value is not None
            and not any(value is a or (type(value) is not bool and value == a) for a in allowed)
        ):
            raise values.error(key, why)


def _all(kind: LayerKind, layers: int) -> tuple[LayerKind, ...]:
    return (kind,) * layers


def _window(values: Values) -> int:
    """w of transformers' sliding_window W, which counts the query's own key: w + 1 = W."""
    return values.whole("sliding_window", least=2) - 1


def _typed(values: Values, layers: int) -> tuple[LayerKind, ...]:
    types = values.entries("layer_types", layers)
    for kind in types:
        if not isinstance(kind, str) or kind not in KINDS:
            raise values.error("layer_types", f"{kind!r} is not one of {', '.join(KINDS)}")
    return tuple(KINDS[kind] for kind in types)


def _checked(values: Values, kinds: tuple[LayerKind, ...]) -> Layers:
    """``kinds`` with the window that the local ones need."""
    if "local" not in kinds:
        values.read |= {"sliding_window"}
        return kinds, None
    return kinds, _window(values)


def _full(values: Values, layers: int) -> Layers:
    """Llama: stock programs attend to everything whatever such keys say, others do not."""
    if values.get("layer_types") is not None and "local" in _typed(values, layers):
        raise values.error(
            "layer_types",
            "transformers ignores it in a llama model and attends to everything; name a model_type that has windows",
        )
    if values.get("sliding_window") is not None:
        raise values.error(
            "sliding_window", "a llama model has no window in transformers; name a model_type that has one"
        )
    return layer_kinds(layers, 1), None


def _zebra(values: Values, layers: int) -> Layers:
    """The released Zebra format, where window_size is w itself: w + 1 keys."""
    kind = values.get("self_attn_type")
    values.read |= {"window_size", "layer_group_size"}
    if kind == "full":
        return layer_kinds(layers, 1), None
    if kind == "sparse":
        return _all("local", layers), values.whole("window_size")
    if kind == "mix":
        return layer_kinds(layers, values.whole("layer_group_size")), values.whole("window_size")
    raise values.error("self_attn_type", "known are mix, full, sparse")


def _mistral(values: Values, layers: int) -> Layers:
    if values.get("layer_types") is not None:
        return _checked(values, _typed(values, layers))
    return _checked(values, _all("global" if values.get("sliding_window") is None else "local", layers))


def _qwen(values: Values, layers: int) -> Layers:
    slides = values.flag("use_sliding_window") and values.get("sliding_window") is not None
    first = values.whole("max_window_layers", least=0)  # the layers BEFORE it are full
    if values.get("layer_types") is None:
        return _checked(values, tuple("local" if slides and i >= first else "global" for i in range(layers)))
    return _switched(values, _typed(values, layers))


def _smollm3(values: Values, layers: int) -> Layers:
    slides = values.flag("use_sliding_window") and values.get("sliding_window") is not None
    if values.get("layer_types") is None:
        nope = _unrotated(values, layers)
        return _checked(values, tuple("local" if slides and i in nope else "global" for i in range(layers)))
    return _switched(values, _typed(values, layers))


def _switched(values: Values, kinds: tuple[LayerKind, ...]) -> Layers:
    if "local" in kinds and not values.flag("use_sliding_window"):
        raise values.error("layer_types", "has sliding layers, but use_sliding_window is false")
    return _checked(values, kinds)


def _unrotated(values: Values, layers: int) -> tuple[int, ...]:
    """SmolLM3's NoPE layers: no_rope_layers has a 0 (sic) for each of them."""
    if values.get("no_rope_layers") is None:
        interval = values.whole("no_rope_layer_interval")
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    values.read.add("no_rope_layer_interval")
    return tuple(i for i, rotated in enumerate(values.entries("no_rope_layers", layers)) if not rotated)


def _every_fourth(values: Values, layers: int) -> Layers:
    """CWM and GraniteSWA: Zebra's own rule with L = 4 where the file says nothing."""
    kinds = layer_kinds(layers, 4) if values.get("layer_types") is None else _typed(values, layers)
    return _checked(values, kinds)


def _own_ropes(
    values: Values, rope: dict[LayerKind, Any], kinds: Sequence[LayerKind]
) -> tuple[dict[LayerKind, Any], tuple[int, ...]]:
    """RoPE where a family sets it by layer: NoPE layers, and GraniteSWA's theta of each layer."""
    layers = len(kinds)
    if "no_rope_layer_interval" in values.defaults:
        return rope, _unrotated(values, layers)
    if "layer_rope_theta" not in values.defaults or values.get("layer_rope_theta") is None:
        return rope, ()
    thetas = values.entries("layer_rope_theta", layers)
    if not all(isinstance(theta, int | float) and (theta == 0 or theta > 1) for theta in thetas):
        raise values.error("layer_rope_theta", "numbers above 1 are needed, or 0 for a layer without RoPE")
    nope = tuple(i for i, theta in enumerate(thetas) if theta == 0)
    for kind in KINDS.values():
        own = {float(theta) for theta, of in zip(thetas, kinds) if of == kind and theta}
        if len(own) > 1:
            raise values.error("layer_rope_theta", f"one theta for all {kind} layers is needed here")
        if own:
            rope[kind] = rope[kind].model_copy(update={"theta": own.pop()})
    return rope, nope


ZEBRA = Family(_zebra, LLAMA)
FAMILIES: dict[str, Family] = {
    "llama": Family(_full, LLAMA),
    "mistral": Family(_mistral, MISTRAL),
    "ministral": Family(_mistral, MISTRAL),
    "qwen2": Family(_qwen, QWEN2, qkv_bias=True),
    "qwen3": Family(_qwen, QWEN2 | {"head_dim": 128}, qk_norm=True),
    "smollm3": Family(_smollm3, SMOLLM3, {"rope_theta": 2e6}),
    "cwm": Family(_every_fourth, CWM, CWM_ROPE),
    "granite_swa": Family(_every_fourth, GRANITE_SWA, sinks=True),
}
