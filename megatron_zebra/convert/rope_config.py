"""RoPE as transformers writes it, to ours and back. Pure; imports no torch.

transformers 5 has ``rope_parameters`` (also one object a layer type), 4 had ``rope_theta`` and ``rope_scaling``; both are read
and both are written, since a version 4 would take a theta that it does not find for its default.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_zebra.config.sections import LayerKind, Rope
from megatron_zebra.convert.values import Values
from megatron_zebra.errors import UserError

KINDS: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "local"}
_SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(values: Values, default: Mapping[str, Any]) -> tuple[dict[LayerKind, Rope], list[str]]:
    """RoPE of each kind of layer, and the keys within that were not understood.

    Args:
        default: what transformers takes where the file says nothing: rope_theta at least.
    """
    scaling, parameters = values.get("rope_scaling"), values.get("rope_parameters")
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise values.error(key, "an object or null is needed")
    theta = values.number("rope_theta") if "rope_theta" in values else None
    values.read.add("rope_theta")
    if scaling and parameters and _contradict(scaling, parameters):
        raise values.error(
            "rope_scaling", f"but rope_parameters is {parameters!r}: leave out the one that is not meant"
        )
    said = {**(parameters or {}), **(scaling or {})}
    if not said:
        said = dict(default) if theta is None or "rope_type" in default else {"rope_theta": theta}
    nested = [key for key in KINDS if isinstance(said.get(key), dict)]
    ropes: dict[LayerKind, Rope] = {}
    unknown: list[str] = []
    for key in nested or [""]:
        part = said[key] if key else said
        shared = {"rope_theta": theta if theta is not None else default["rope_theta"]}
        prefix = f"rope_parameters.{key}." if key else "rope_parameters."
        inner = Values(values.file, {k: v for k, v in part.items() if v is not None}, shared, prefix)
        rope = _read_one(inner, values)
        unknown += inner.unread(frozenset())
        for kind in [KINDS[key]] if key else KINDS.values():
            ropes[kind] = rope
    return {kind: ropes.get(kind) or next(iter(ropes.values())) for kind in KINDS.values()}, unknown


def _contradict(scaling: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    def same(a: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in a.items() if k not in ("type", "rope_type", "rope_theta") and v is not None}
        return kept | {"rope_type": a.get("rope_type", a.get("type", "default"))}

    return same(scaling) != same(parameters)


def _read_one(part: Values, whole: Values) -> Rope:
    old, new = part.get("type"), part.get("rope_type")
    scaling = new or old or "default"
    if scaling not in _SCALINGS:
        raise part.error("rope_type", f"known here are {', '.join(_SCALINGS)}")
    if part.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise part.error("partial_rotary_factor", "here RoPE turns all of a head")
    theta = part.number("rope_theta", above=1.0)
    longest = whole.whole("max_position_embeddings")
    if scaling == "default":
        return Rope(theta=theta)
    if scaling == "linear":
        return Rope(theta=theta, scaling="linear", factor=_factor(part))
    if scaling == "dynamic":
        if part.get("original_max_position_embeddings") not in (None, longest):
            raise part.error(
                "original_max_position_embeddings", f"dynamic NTK counts from max_position_embeddings = {longest}"
            )
        factor = _factor(part)
        return Rope(
            theta=theta, scaling="dynamic", factor=factor, original_length=longest, length=math.ceil(factor * longest)
        )
    original = _original(part, whole, longest)
    if scaling == "llama3":
        low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
        if high <= low:
            raise part.error("high_freq_factor", f"more than low_freq_factor = {low:g} is needed")
        return Rope(
            theta=theta,
            scaling="llama3",
            factor=_factor(part),
            original_length=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return _read_yarn(part, theta, original, longest)


def _read_yarn(part: Values, theta: float, original: int, longest: int) -> Rope:
    if part.get("truncate") not in (None, True):
        raise part.error("truncate", "here YaRN rounds the bounds of its ramp")
    factor = _factor(part) if "factor" in part else max(1.0, longest / original)
    attention = part.number("attention_factor") if "attention_factor" in part else None
    over, under = (part.get(key) for key in ("mscale", "mscale_all_dim"))
    if attention is None and over and under:
        attention = _yarn_scale(factor, part.number("mscale")) / _yarn_scale(factor, part.number("mscale_all_dim"))
    part.read |= {"attention_factor", "factor", "beta_fast", "beta_slow"}
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_length=original,
        beta_fast=part.number("beta_fast") if "beta_fast" in part else 32.0,
        beta_slow=part.number("beta_slow") if "beta_slow" in part else 1.0,
        attention_factor=attention,
    )


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factor(part: Values) -> float:
    factor = part.number("factor")
    if factor < 1.0:
        raise part.error("factor", "1 or more is needed")
    return factor


def _original(part: Values, whole: Values, longest: int) -> int:
    """The length trained at first: beside the scaling, or (as some files have it) beside max_position_embeddings."""
    for values in (whole, part):
        if "original_max_position_embeddings" in values:
            part.read.add("original_max_position_embeddings")
            return values.whole("original_max_position_embeddings")
    return longest


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """transformers' ``rope_parameters``. Our dynamic NTK is frozen, so it is a plain theta to others."""
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "dynamic":
        return {"rope_type": "default", "rope_theta": frozen_theta(rope, head_dim)}
    written: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.scaling == "linear":
        return written
    written["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        return written | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return written if rope.attention_factor is None else written | {"attention_factor": rope.attention_factor}


def frozen_theta(rope: Rope, head_dim: int) -> float:
    """The base that dynamic NTK comes to at its length."""
    assert rope.original_length is not None
    assert rope.length is not None
    if head_dim < 4:
        raise UserError(f"dynamic RoPE needs heads of 4 or more dimensions, not {head_dim}")
    stretch = rope.factor * max(rope.length, rope.original_length) / rope.original_length - (rope.factor - 1.0)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))
