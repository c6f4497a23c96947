"""Bytes of the KV cache. Pure."""

from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.pattern import LayerKind


def kv_cache_bytes(arch: Architecture, tokens: int, element_bytes: int, tp: int = 1, block: int = 1024) -> int:
    """Of one sequence of ``tokens`` tokens on one rank.

    A local layer has w + 1 slots from its first token on; a global layer grows by ``block`` tokens. Of each token 2 Hkv D
    elements are kept, Hkv the rank's KV heads (at least one).
    """
    return sum(kv_layer_bytes(arch, kind, tokens, element_bytes, tp, block) for kind in arch.layer_kinds)


def kv_layer_bytes(
    arch: Architecture, kind: LayerKind, tokens: int, element_bytes: int, tp: int = 1, block: int = 1024
) -> int:
    """Of one of its layers."""
    if tokens <= 0:
        return 0
    slots = -(-tokens // block) * block if kind == "global" else arch.window_size + 1
    return 2 * max(1, arch.num_kv_heads // tp) * arch.head_dim * element_bytes * slots
