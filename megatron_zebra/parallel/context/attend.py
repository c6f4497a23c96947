"""Attention over one rank's tokens, whether it has all of the sequence or shares it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, check_window
from megatron_zebra.parallel.context.exchange import Arrive, Exchange, Fetch, Lend, Returns
from megatron_zebra.parallel.context.refetch import Refetch
from megatron_zebra.parallel.context.shard import ContextShard

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments | ContextShard,
    *,
    window: Window,
    backend: str,
    deterministic: bool = False,
) -> torch.Tensor:
    """``attention.contract.attention`` over the tokens of this rank; under context parallelism all its ranks call together.

    q: [T, H, D]; k, v: [T, Hkv, D] of the rank's own tokens, rotated by their positions in their documents. Returns
    [T, H, D].

    Raises:
        ValueError: head groups that do not divide the KV heads; what the kernel refuses.
    """
    window = check_window(window)
    if isinstance(segments, Segments):
        return attention(q, k, v, segments, window=window, backend=backend, deterministic=deterministic)
    exchange, keys = segments.by_window(window)
    kernel = partial(attention, segments=keys, window=window, backend=backend, deterministic=deterministic)
    if not exchange.plan.anything_sent and exchange.plan.keys_are_own:
        return kernel(q, k, v)
    context = segments.context
    if window is not None:
        return _by_heads(kernel, exchange, q, k, v, groups=1, keep_fetched=True)
    if k.shape[1] % context.head_groups:
        raise ValueError(
            f"{k.shape[1]} KV heads of a rank cannot be divided into parallel.cp_head_groups = {context.head_groups}"
        )
    return _by_heads(kernel, exchange, q, k, v, context.head_groups, context.keep_fetched)


def _by_heads(
    kernel: Kernel,
    exchange: Exchange,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: int,
    keep_fetched: bool,
) -> torch.Tensor:
    """One kernel call for each group of heads; the next group's keys are under way meanwhile, in both directions."""
    returns = Returns(exchange, k)
    ticket = Lend.apply(k, v, returns)
    size = k.shape[1] // groups
    heads = [slice(g * size, (g + 1) * size) for g in range(groups)]
    fetches = [partial(Fetch, exchange, k[:, h].detach(), v[:, h].detach()) for h in heads]
    queries = q.split(q.shape[1] // groups, 1)

    coming, refetch = fetches[0](), None
    out = []
    for g in range(groups):
        keys = Arrive.apply(ticket, coming, heads[g], returns)
        if g + 1 < groups:
            coming = fetches[g + 1]()
        refetch = None if keep_fetched else Refetch(fetches[g], refetch)
        with refetch.hooks(keys[0]) if refetch else nullcontext():
            out.append(kernel(queries[g], *keys))
        del keys  # before the next group's keys are made
    return out[0] if groups == 1 else torch.cat(out, 1)
