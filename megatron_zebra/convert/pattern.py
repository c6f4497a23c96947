"""Which layers stay global when a model becomes a Zebra. Pure; imports no torch."""

from dataclasses import replace

from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import LayerKind, layer_kinds

RULE = "first-of-group"
_NAMES: dict[str, LayerKind] = {"global": "global", "full": "global", "local": "local"}


def with_pattern(
    arch: Architecture, layer_group_size: int | None, window_size: int | None, pattern: str | None
) -> Architecture:
    """``arch`` with the layers that the options name; unchanged if there are none.

    Args:
        layer_group_size: L of the paper's rule.
        window_size: w of the local layers.
        pattern: ``first-of-group``, the numbers of the global layers, or a kind for each layer, with commas between.
    """
    if layer_group_size is None and window_size is None and pattern is None:
        return arch
    if layer_group_size is not None and pattern not in (None, RULE):
        raise UserError(f"--pattern {pattern}: and --layer-group-size says it too; leave one out")
    if layer_group_size is not None and layer_group_size < 1:
        raise UserError(f"--layer-group-size {layer_group_size}: must be 1 or more (1 = all layers global)")
    if window_size is not None and window_size < 1:
        raise UserError(
            f"--window-size {window_size}: must be 1 or more (a local query sees itself and so many keys before)"
        )
    if pattern is not None and pattern != RULE:
        kinds = _listed(pattern, arch.num_layers)
    elif layer_group_size is not None:
        kinds = layer_kinds(arch.num_layers, layer_group_size)
    elif pattern == RULE:
        raise UserError(f"--pattern {RULE}: needs --layer-group-size")
    else:
        kinds = arch.layer_kinds
    if window_size is not None and "local" not in kinds:
        raise UserError(f"--window-size {window_size}: no layer is local; give --layer-group-size or --pattern too")
    if "local" in kinds and window_size is None and "local" not in arch.layer_kinds:
        raise UserError("--window-size is missing: the model has no window of its own")
    return replace(arch, layer_kinds=kinds, window_size=window_size or arch.window_size)


def _listed(pattern: str, layers: int) -> tuple[LayerKind, ...]:
    words = [word.strip() for word in pattern.split(",")]
    if all(word in _NAMES for word in words):
        if len(words) != layers:
            raise UserError(f"--pattern: names {len(words)} kinds, the model has {layers} layers")
        return tuple(_NAMES[word] for word in words)
    if not all(word.isdecimal() for word in words):
        raise UserError(
            f"--pattern {pattern}: allowed are {RULE}, numbers of global layers (0,9,18), or a kind for each layer (global,local,...)"
        )
    chosen = {int(word) for word in words}
    if max(chosen) >= layers:
        raise UserError(f"--pattern {pattern}: layer {max(chosen)} does not exist, the model has {layers} (from 0)")
    return tuple("global" if i in chosen else "local" for i in range(layers))
