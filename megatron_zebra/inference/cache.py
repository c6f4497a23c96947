"""The KV cache: a local layer keeps the last w keys and the newest, in a ring; a global layer keeps all, in blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window

BLOCK = 1024  # tokens by which a global layer's store grows

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Window], torch.Tensor]
"""Attention of the last len(q) tokens over len(k) keys of one sequence: q, k, v, window."""


class Ring:
    """Keys and values of the last ``window`` tokens, and of the newest: ``window + 1`` slots of [2, Hkv, D].

    Token i lies in slot i % (window + 1), so that the newest takes the place of the one that nobody sees any more.
    """

    def __init__(self, window: int) -> None:
        self.slots = window + 1
        self.length = 0  # tokens seen so far
        self.store: torch.Tensor | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        if self.store is None:
            self.store = _storage(k, self.slots)
        new, before = k.shape[0], min(self.length, self.slots - 1)
        if new == 1:
            # One query sees all that is kept, in whatever order it lies.
            self._put(k, v)
            held = min(self.length, self.slots)
            keys, values = self.store[:, :held]
            return kernel(q, keys, values, None)
        if before:
            k, v = self._joined(before, k, v)
        out = kernel(q, k, v, self.slots - 1)
        self._put(k[-new:], v[-new:])
        return out

    def _put(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in new tokens' keys: of more than there are slots, the last ones."""
        assert self.store is not None
        new = k.shape[0]
        end, kept = self.length + new, min(new, self.slots)
        first = (end - kept) % self.slots
        head = min(kept, self.slots - first)
        for store, last in zip(self.store, (k[-kept:], v[-kept:])):
            store[first : first + head] = last[:head]
            store[: kept - head] = last[head:]
        self.length = end

    def _joined(self, count: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last ``count`` tokens' keys and values in order, and behind them the new ones: each copied once."""
        assert self.store is not None
        first = (self.length - count) % self.slots
        head = min(count, self.slots - first)
        keys, values = (
            torch.cat([kept[first : first + head], kept[: count - head], new]) for kept, new in zip(self.store, (k, v))
        )
        return keys, values


class Growing:
    """Keys and values of all tokens, [2, capacity, Hkv, D], the capacity a multiple of BLOCK."""

    def __init__(self) -> None:
        self.length = 0
        self.store: torch.Tensor | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        end = self.length + k.shape[0]
        store = self._room(end, k)
        store[0, self.length : end], store[1, self.length : end] = k, v
        self.length = end
        return kernel(q, store[0, :end], store[1, :end], None)

    def _room(self, needed: int, like: torch.Tensor) -> torch.Tensor:
        if self.store is None or self.store.shape[1] < needed:
            grown = _storage(like, -(-needed // BLOCK) * BLOCK)
            if self.store is not None:
                grown[:, : self.length] = self.store[:, : self.length]
            self.store = grown
        return self.store


class Cache:
    """Keys of a batch of sequences. ``step`` opens one call of the model over new tokens of some of them."""

    def __init__(self, sequences: int) -> None:
        self.layers: list[dict[int, Ring | Growing]] = [{} for _ in range(sequences)]
        self.lengths = [0] * sequences

    @property
    def bytes(self) -> int:
        """Of all that is kept, room for later tokens included."""
        stores = [layer.store for kept in self.layers for layer in kept.values()]
        return sum(store.numel() * store.element_size() for store in stores if store is not None)

    def step(self, new: Mapping[int, int], padding: int = 0) -> "Step":
        """For ``new[s]`` further tokens of each sequence s, packed in this order, then ``padding`` tokens of none."""
        return Step(self, dict(new), padding)


@dataclass(frozen=True)
class Step:
    """What one call of the model attends by of the model; every layer attends once."""

    cache: Cache
    new: dict[int, int]
    padding: int
    segments: dict[tuple[int, int], Segments] = field(default_factory=dict)  # by queries and keys: layers share them

    def positions(self) -> torch.Tensor:
        """[T], on the host."""
        parts = [torch.arange(self.cache.lengths[s], self.cache.lengths[s] + n) for s, n in self.new.items()]
        return torch.cat([*parts, torch.zeros(self.padding, dtype=torch.int64)])

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: Window, backend: str
    ) -> torch.Tensor:
        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window) -> torch.Tensor:
            return attention(q, k, v, self._segments(q.shape[0], k.shape[0], q.device), window=window, backend=backend)

        if len(self.new) == 1 and not self.padding:
            return self._layer(next(iter(self.new)), layer, window).attend(q, k, v, kernel)
        sizes = [*self.new.values(), self.padding]
        parts = zip(self.new, q.split(sizes), k.split(sizes), v.split(sizes))
        out = [self._layer(s, layer, window).attend(q_s, k_s, v_s, kernel) for s, q_s, k_s, v_s in parts]
        return torch.cat([*out, q.new_zeros(self.padding, *q.shape[1:])])

    def done(self) -> None:
        """The model has seen the new tokens."""
        for sequence, count in self.new.items():
            self.cache.lengths[sequence] += count

    def _segments(self, queries: int, keys: int, device: torch.device) -> Segments:
        if (queries, keys) not in self.segments:
            self.segments[queries, keys] = Segments.from_lengths([queries], [keys], device)
        return self.segments[queries, keys]

    def _layer(self, sequence: int, layer: int, window: Window) -> Ring | Growing:
        kept = self.cache.layers[sequence]
        if layer not in kept:
            kept[layer] = Growing() if window is None else Ring(window)
        return kept[layer]


def _storage(like: torch.Tensor, tokens: int) -> torch.Tensor:
    """[2, tokens, Hkv, D] for keys and values as ``like`` [T, Hkv, D]; in memory a head's tokens lie side by side, since
    a query that is generated reads head by head."""
    return like.new_empty(2, like.shape[1], tokens, like.shape[2]).transpose(1, 2)
