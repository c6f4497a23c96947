"""Bytes of the KV cache. Pure."""

from megatron_zebra.model.architecture import Architecture


def kv_cache_bytes(arch: Architecture, tokens: int, element_bytes: int, tp: int = 1, block: int = 1024) -> int:
    """Of one sequence of ``tokens`` tokens on one rank.

    A local layer has w + 1 slots from its first token on; a global layer grows by ``block`` tokens. Of each token 2 Hkv D
    elements are kept, Hkv the rank's KV heads (at least one).
    """
    if not tokens:
        return 0
    per_token = 2 * max(1, arch.num_kv_heads // tp) * arch.head_dim * element_bytes
    whole = -(-tokens // block) * block
    return per_token * sum(whole if kind == "global" else arch.window_size + 1 for kind in arch.layer_kinds)
