"""A model without open questions: every null of the configuration resolved. Pure; imports no torch."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from megatron_zebra.config.derived import ffn_width, head_dim, kv_heads
from megatron_zebra.config.fields import READ_BACK
from megatron_zebra.config.sections import Model, Rope
from megatron_zebra.model.pattern import LayerKind, layer_kinds

Size = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True)
class Architecture:
    """What decides the function that the model computes; kept in checkpoints and compared when one is loaded."""

    __pydantic_config__ = READ_BACK

    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    ffn_hidden_size: Size
    vocab_size: Size
    layer_kinds: tuple[LayerKind, ...]
    window_size: Size
    rope: dict[LayerKind, Rope]
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    nope_layers: tuple[int, ...] = ()
    max_length: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    def window(self, layer: int) -> int | None:
        """The window of layer ``layer`` (by global number); None = everything."""
        return self.window_size if self.layer_kinds[layer] == "local" else None

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by name, with its whole shape [out, in]."""
        h, d, f = self.hidden_size, self.head_dim, self.ffn_hidden_size
        q, kv = self.num_heads * d, self.num_kv_heads * d
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, h)}
        for i in range(self.num_layers):
            layer: dict[str, tuple[int, ...]] = {"attention_norm.weight": (h,)}
            for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                layer[f"attention.{name}.weight"] = (width, h)
                if self.qkv_bias:
                    layer[f"attention.{name}.bias"] = (width,)
            if self.qk_norm:
                layer |= {"attention.q_norm.weight": (d,), "attention.k_norm.weight": (d,)}
            layer |= {"attention.o_proj.weight": (h, q), "mlp_norm.weight": (h,)}
            layer |= {"mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f)}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm.weight"] = (h,)
        if not self.tie_embeddings:
            shapes["head.weight"] = (self.vocab_size, h)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {
            "layer_kinds": list(self.layer_kinds),
            "nope_layers": list(self.nope_layers),
            "rope": {k: r.model_dump() for k, r in self.rope.items()},
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Architecture":
        """The inverse of ``to_dict``; ValueError if ``values`` are no such thing."""
        return _STORED.validate_json(json.dumps(values))  # JSON, since that has no tuples


_STORED = TypeAdapter(Architecture)


def resolve(model: Model, vocab_size: int, sequence_length: int) -> Architecture:
    """Fill in what ``model`` leaves open.

    Args:
        vocab_size: used where ``model.vocab_size`` is null.
        sequence_length: the longest trained, used where a dynamic RoPE has no ``length`` of its own.
    """

    def frozen(rope: Rope) -> Rope:
        return rope.model_copy(update={"length": rope.length or sequence_length}) if rope.scaling == "dynamic" else rope

    return Architecture(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=kv_heads(model),
        head_dim=head_dim(model),
        ffn_hidden_size=ffn_width(model),
        vocab_size=model.vocab_size or vocab_size,
        layer_kinds=tuple(model.layer_kinds)
        if model.layer_kinds
        else layer_kinds(model.num_layers, model.layer_group_size),
        window_size=model.window_size,
        rope={"global": frozen(model.rope), "local": frozen(model.rope_local or model.rope)},
        tie_embeddings=model.tie_embeddings,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        norm_eps=model.norm_eps,
        nope_layers=tuple(sorted(model.nope_layers)),
        max_length=model.max_length or sequence_length,
    )
