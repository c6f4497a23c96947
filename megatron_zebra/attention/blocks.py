"""How the CPU kernel cuts packed segments into calls: pure index arithmetic, so that the cost can be counted.

Every call is a batch of equal tiles, a tile being some queries and a range of keys:

* ``Tiles``: tiles at a constant stride, read through views. ``causal`` tiles are square; ``band`` tiles are a stretch of
  a window layer, ``rows`` queries and the ``window + rows`` keys that end with them; ``dense`` tiles have no mask.
* ``Padded``: segments of nearly the same short length, gathered and padded at their end, where causal order hides it.

Where a segment has more keys than queries and no window, a causal tile and a dense tile for the keys before it share
their queries, and the kernel merges the two.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_zebra.attention.window import Int64, Window

SHORT = 64  # segments up to this long are batched with others of their length ...
SHORT_STEP = 8  # ... rounded up to a multiple of this


@dataclass(frozen=True)
class Tiles:
    """``count`` tiles: tile t has queries ``q_start + t·rows ..`` and keys ``k_start + t·rows ..``."""

    kind: Literal["causal", "band", "dense"]
    q_start: int
    k_start: int
    rows: int
    keys: int
    count: int = 1
    merge: bool = False  # its queries already have a result, over other keys

    @property
    def pairs(self) -> int:
        """(Query, key) pairs that the kernel computes; it skips what lies above a causal tile's diagonal."""
        return self.count * (self.rows * (self.rows + 1) // 2 if self.kind == "causal" else self.rows * self.keys)


@dataclass(frozen=True, eq=False)
class Padded:
    """Segments padded to ``length``: row ``source`` of the packed tensors is row ``target`` of [count · length]."""

    length: int
    count: int
    q_source: Int64
    k_source: Int64
    target: Int64
    banded: bool  # the window hides something, so a mask is needed

    @property
    def pairs(self) -> int:
        return self.count * self.length * (self.length if self.banded else self.length + 1) // (1 if self.banded else 2)


@dataclass(frozen=True)
class Plan:
    """The calls for one pattern of segments and one window, in order."""

    window: Window
    total_q: int
    total_k: int
    tiles: list[Tiles] = field(default_factory=list)
    padded: list[Padded] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return sum(t.pairs for t in self.tiles) + sum(p.pairs for p in self.padded)

    @property
    def calls(self) -> int:
        return len(self.tiles) + len(self.padded)

    @property
    def whole(self) -> bool:
        """Whether one causal tile is all that is packed."""
        return [(t.kind, t.rows, t.rows) for t in self.tiles] == [("causal", self.total_q, self.total_k)]


def band_rows(window: int, group: int) -> int:
    """Queries of a band tile.

    Each of them costs window + rows pairs, which asks for few; each tile's dk and dv are written apart before they are
    added up, which asks for many, the more so the fewer query heads (``group``) share a key. The kernel works on 32
    queries at a time. The rule is the fastest of those measured for windows of 64 to 2048 and groups of 1 and 4.
    """
    return max(32, min(256, window // (4 * min(group, 4))))


def plan(cu_q: Int64, cu_k: Int64, window: Window, group: int = 1) -> Plan:
    """Cut the segments into calls that compute O(total · window) pairs; ``group`` query heads share a key head."""
    result = Plan(window, int(cu_q[-1]), int(cu_k[-1]))
    rows = 0 if window is None else band_rows(window, group)
    short: dict[int, list[int]] = {}
    q_lengths, k_lengths = np.diff(cu_q), np.diff(cu_k)
    for s, (queries, keys) in enumerate(zip(q_lengths.tolist(), k_lengths.tolist())):
        if 0 < keys <= SHORT and queries == keys:
            short.setdefault(-(-keys // SHORT_STEP) * SHORT_STEP, []).append(s)
        elif queries:
            result.tiles.extend(_segment(int(cu_q[s]), int(cu_k[s]), queries, keys, window, rows))
    for _, members in sorted(short.items()):
        if len(members) == 1 and (window is None or k_lengths[members[0]] <= window + 1):
            s = members[0]
            result.tiles.extend(
                _segment(int(cu_q[s]), int(cu_k[s]), int(q_lengths[s]), int(k_lengths[s]), window, rows)
            )
        else:
            longest = int(k_lengths[members].max())
            result.padded.append(_pad(cu_q[members], cu_k[members], k_lengths[members], longest, window))
    return result


def _segment(q0: int, k0: int, queries: int, keys: int, window: Window, rows: int) -> list[Tiles]:
    """Tiles of one segment: what sees back to its first key, then the band."""
    before = keys - queries
    if window is None or keys <= window + 1:
        return _full(q0, k0, queries, keys)
    tiles = []
    ramp = max(0, min(window - before, queries))
    if ramp:
        tiles += _full(q0, k0, ramp, before + ramp)
    count, rest = divmod(queries - ramp, rows)
    q0, k0 = q0 + ramp, k0 + before + ramp - window
    if count:
        tiles.append(Tiles("band", q0, k0, rows, window + rows, count))
    if rest:
        kind: Literal["band", "dense"] = "dense" if rest == 1 else "band"
        tiles.append(Tiles(kind, q0 + count * rows, k0 + count * rows, rest, window + rest))
    return tiles


def _full(q0: int, k0: int, queries: int, keys: int) -> list[Tiles]:
    before = keys - queries
    if queries == 1:
        return [Tiles("dense", q0, k0, 1, keys)]
    tiles = [Tiles("causal", q0, k0 + before, queries, queries)]
    if before:
        tiles.append(Tiles("dense", q0, k0, queries, before, merge=True))
    return tiles


def _pad(q_starts: Int64, k_starts: Int64, lengths: Int64, longest: int, window: Window) -> Padded:
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target = np.repeat(np.arange(len(lengths)) * longest, lengths) + within
    return Padded(
        length=longest,
        count=len(lengths),
        q_source=np.repeat(q_starts, lengths) + within,
        k_source=np.repeat(k_starts, lengths) + within,
        target=target,
        banded=window is not None and longest > window + 1,
    )
