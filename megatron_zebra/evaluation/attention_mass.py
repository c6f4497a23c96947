"""How far back a model's layers look: the share of attention that falls on keys further away than a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_zebra.attention.contract import Segments
from megatron_zebra.data.rows import Row
from megatron_zebra.model.attention import Attention
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.rope import rotate

SCORES_AT_ONCE = 2**23  # elements of the scores that exist at once


@dataclass(frozen=True)
class Profile:
    """Mean over the measured queries that have keys beyond the window (so many ``queries``), by window [W], layer [n], head [H].

    ``mass``: share of attention on keys further back than the window. ``mass_without_sinks``: the same, without what falls
    on a document's first ``sinks`` tokens, where softmax leaves attention that it has no use for.
    """

    windows: tuple[int, ...]
    sinks: int
    mass: torch.Tensor
    mass_without_sinks: torch.Tensor
    queries: list[int]


@torch.no_grad()
def profile(
    model: Decoder,
    rows: Sequence[Row],
    windows: Sequence[int],
    sinks: int = 4,
    every: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> Profile:
    """Run ``model`` over ``rows`` and measure every layer as if it saw everything.

    Args:
        every: measure every so many queries of a document.
        rows: of at least one document longer than the largest window.
        progress: told after each layer of each row.

    Raises:
        ValueError: no query has a key beyond the largest window.
    """
    device = next(model.parameters()).device
    layers = [_attention_of(block) for block in model.layers.values()]
    masses: list[list[torch.Tensor]] = [[] for _ in layers]
    queries = torch.zeros(len(windows), dtype=torch.int64)
    for row in rows:
        lengths: list[int] = row.lengths.tolist()
        measured = np.concatenate([np.arange(0, n, every) for n in lengths])
        queries += torch.tensor([int((measured > w).sum()) for w in windows])
        measure = partial(_measure, lengths=lengths, windows=windows, sinks=sinks, every=every)
        hooks = [layer.register_forward_pre_hook(partial(measure, into=into)) for layer, into in zip(layers, masses)]
        hooks += [layer.register_forward_hook(lambda *_: progress()) for layer in layers]
        try:
            tokens, positions = (torch.from_numpy(part).to(device) for part in (row.tokens, row.positions))
            # No label: the head makes no logits for them.
            model(tokens, positions, Segments.from_lengths(lengths, device=device), torch.full_like(tokens, -100))
        finally:
            for hook in hooks:
                hook.remove()
    if not queries.min():
        raise ValueError(f"no document reaches beyond the window {max(windows)}")
    sums = torch.stack([torch.stack(of_layer).sum(0) for of_layer in masses], 2).cpu()  # [2, windows, layers, heads]
    means = sums / queries[:, None, None]
    return Profile(tuple(windows), sinks, means[0], means[1], queries.tolist())


def mass_beyond(q: torch.Tensor, k: torch.Tensor, windows: Sequence[int], sinks: int, every: int = 1) -> torch.Tensor:
    """Attention on keys j < i - w, summed over the queries i = 0, every, 2 every, ... of one document, with and without keys
    j < ``sinks``.

    q: [T, H, D]; k: [T, Hkv, D]; the softmax is over all j <= i. Returns [2, windows, H] in fp64. Memory O(T), time O(T^2 / every).
    """
    length, heads, dim = q.shape
    asked = torch.arange(0, length, every, device=q.device)
    kv_heads = k.shape[1]
    k = k.float()
    out = torch.zeros(2, len(windows), heads, dtype=torch.float64, device=q.device)
    at_once = max(1, SCORES_AT_ONCE // (heads * length))
    for i in asked.split(at_once):
        stop = int(i[-1]) + 1
        part = q[i].float().unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("qhgd,khd->hgqk", part, k[:stop]).flatten(0, 1) * dim**-0.5
        scores.masked_fill_(torch.arange(stop, device=q.device) > i[:, None], float("-inf"))
        below = scores.softmax(-1).cumsum(-1)  # [H, queries, keys]: on keys up to j
        sink = below[..., min(sinks, stop) - 1] if sinks else torch.zeros_like(below[..., 0])
        for number, window in enumerate(windows):
            last = i - window - 1  # the nearest key beyond the window
            beyond = below.gather(-1, last.clamp_min(0).expand(heads, -1)[..., None])[..., 0]
            out[0, number] += beyond.masked_fill(last < 0, 0.0).sum(-1, dtype=torch.float64)
            out[1, number] += (beyond - sink).masked_fill(last < sinks, 0.0).sum(-1, dtype=torch.float64)
    return out


def _attention_of(block: Any) -> Attention:
    found: Attention = block.attention
    return found


def _measure(
    layer: Any,
    given: tuple[Any, ...],
    *,
    into: list[torch.Tensor],
    lengths: list[int],
    windows: Sequence[int],
    sinks: int,
    every: int,
) -> None:
    """Before ``layer`` sees what it is given: add its mass [2, windows, H] to ``into``."""
    q, k = _queries_and_keys(layer, *given[:2])
    parts = [mass_beyond(*part, windows, sinks, every) for part in zip(q.split(lengths), k.split(lengths))]
    into.append(torch.stack(parts).sum(0))


def _queries_and_keys(
    layer: Attention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, heads, D] each, as the layer's kernel gets them."""
    q, k = (proj(x).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.q_proj, layer.k_proj))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    return (rotate(q, *rope), rotate(k, *rope)) if layer.rotated else (q, k)


def most_distant(profile: Profile, window: int, count: int) -> list[int]:
    """The ``count`` layers with the most attention beyond ``window``, sinks aside, in order of depth."""
    by_layer = profile.mass_without_sinks[profile.windows.index(window)].mean(-1)
    return sorted(by_layer.argsort(descending=True)[:count].tolist())
