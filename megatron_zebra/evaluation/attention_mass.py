"""How far back a model's layers look: the share of attention that falls on keys further away than a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_zebra.attention.contract import Segments, attention
from megatron_zebra.attention.window import Window
from megatron_zebra.data.rows import Row
from megatron_zebra.model.decoder import Decoder

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
    masses: dict[int, list[torch.Tensor]] = {}
    queries = torch.zeros(len(windows), dtype=torch.int64)
    for row in rows:
        lengths: list[int] = row.lengths.tolist()
        measured = np.concatenate([np.arange(0, n, every) for n in lengths])
        queries += torch.tensor([int((measured > w).sum()) for w in windows])
        tokens, positions = (torch.from_numpy(part).to(device) for part in (row.tokens, row.positions))
        segments = Segments.from_lengths(lengths, device=device)
        model.states(tokens, positions, _Measuring(segments, lengths, windows, sinks, every, masses, progress))
    if not queries.min():
        raise ValueError(f"no document reaches beyond the window {max(windows)}")
    sums = torch.stack(
        [torch.stack(masses[layer]).sum(0) for layer in sorted(masses)], 2
    ).cpu()  # [2, windows, layers, heads]
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


@dataclass(frozen=True)
class _Measuring:
    """Plain attention over ``segments``, of documents of ``lengths``, that leaves each layer's mass in ``masses``."""

    segments: Segments
    lengths: list[int]
    windows: Sequence[int]
    sinks: int
    every: int
    masses: dict[int, list[torch.Tensor]]
    progress: Callable[[], object]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: Window, backend: str
    ) -> torch.Tensor:
        documents = zip(q.split(self.lengths), k.split(self.lengths))
        parts = [mass_beyond(*document, self.windows, self.sinks, self.every) for document in documents]
        self.masses.setdefault(layer, []).append(torch.stack(parts).sum(0))
        self.progress()
        return attention(q, k, v, self.segments, window=window, backend=backend)


def most_distant(profile: Profile, window: int, count: int) -> list[int]:
    """The ``count`` layers with the most attention beyond ``window``, sinks aside, in order of depth."""
    by_layer = profile.mass_without_sinks[profile.windows.index(window)].mean(-1)
    return sorted(by_layer.argsort(descending=True)[:count].tolist())
