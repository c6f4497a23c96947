"""Which layers are global and which are local, resolved once by global layer number."""

from collections.abc import Sequence
from typing import Literal

LayerKind = Literal["global", "local"]


def layer_kinds(num_layers: int, layer_group_size: int) -> tuple[LayerKind, ...]:
    """Zebra's rule: layer i (from 0) is global iff ``i % layer_group_size == 0``, the first of each group."""
    return tuple("global" if i % layer_group_size == 0 else "local" for i in range(num_layers))


def from_megatron(window_attn_skip_freq: int | Sequence[int], num_layers: int) -> tuple[LayerKind, ...]:
    """Read Megatron-LM's ``--window-attn-skip-freq``.

    A list has 1 for a window layer and 0 for a full one. An integer N makes the LAST layer of each N full, which is
    not Zebra's order (the first).
    """
    if isinstance(window_attn_skip_freq, int):
        return tuple("global" if (i + 1) % window_attn_skip_freq == 0 else "local" for i in range(num_layers))
    if len(window_attn_skip_freq) != num_layers:
        raise ValueError(f"window_attn_skip_freq has {len(window_attn_skip_freq)} entries for {num_layers} layers")
    return tuple("local" if windowed else "global" for windowed in window_attn_skip_freq)


def cells(kinds: Sequence[LayerKind]) -> str:
    """The pattern as text, one cell a layer."""
    return "".join("█" if kind == "global" else "░" for kind in kinds)


def stripes(kinds: Sequence[LayerKind], window_size: int) -> str:
    """The pattern as lines of cells with what they mean, for logs and dry runs."""
    drawn = cells(kinds)
    count = sum(kind == "global" for kind in kinds)
    lines = [f"  layer {start:4d}  {drawn[start : start + 64]}" for start in range(0, len(drawn), 64)]
    lines.append(f"  █ {count} global (all keys)   ░ {len(kinds) - count} local (itself and {window_size} keys before)")
    return "\n".join(lines)
