"""Who sends which tokens' keys and values to whom, so that every query finds what its mask allows. Pure: no torch.

What a stretch of a rank's tokens needs from before it is one range that ends where the stretch starts
(``attention.window.fetched_range``). So of any chunk a rank wants a suffix, or nothing, however many of its own chunks
want some of it: the longest of the suffixes is sent, once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_zebra.attention.window import Int64, Window, fetched_range
from megatron_zebra.parallel.context.layout import (
    Order,
    chunk_length,
    chunk_owners,
    local_index,
    ranges,
    stretches,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank sends, and how it reads what it has and gets.

    ``sent``: [cp, cp] tokens that each rank (first axis) sends to each other; the same on every rank.
    ``send``: [sum of sent[rank]] which of its own tokens the rank sends, grouped by destination.
    ``pick``: [keys] which of its own tokens (0 ..) and received ones (after them, grouped by source) are the keys of the
    kernel's call. Its queries are the rank's own tokens, in their order.
    ``cu_q``, ``cu_k``: [segments + 1] boundaries of the call's segments: the parts of documents that the rank holds. A
    segment's queries are the last of its keys.

    For the way back: own or received token i is key ``first_use[i]``; and token ``reused[j]`` is key ``second_use[j]`` too.
    """

    rank: int
    sent: Int64
    send: Int64
    pick: Int64
    cu_q: Int64
    cu_k: Int64
    first_use: Int64
    reused: Int64
    second_use: Int64

    @property
    def send_counts(self) -> list[int]:
        """Tokens sent, by destination."""
        return [int(n) for n in self.sent[self.rank]]

    @property
    def receive_counts(self) -> list[int]:
        """Tokens received, by source."""
        return [int(n) for n in self.sent[:, self.rank]]

    @property
    def tokens(self) -> int:
        """The rank's own."""
        return int(self.cu_q[-1])

    @property
    def received(self) -> int:
        """Tokens received from all."""
        return int(self.sent[:, self.rank].sum())

    @property
    def anything_sent(self) -> bool:
        """Whether any rank sends a token."""
        return bool(self.sent.any())

    @property
    def keys_are_own(self) -> bool:
        """Whether the keys are the rank's own tokens as they lie."""
        return self.received == 0 and len(self.pick) == self.tokens


def tokens_sent(
    cu_seqlens: npt.ArrayLike, rows: int, sequence_length: int, cp: int, order: Order, window: Window
) -> Int64:
    """Tokens whose keys and values each rank sends to each other in a layer's forward: [cp (source), cp (destination)].

    The gradients go the other way. Arguments as in ``make_plan``.
    """
    cu = _checked(cu_seqlens, rows, sequence_length)
    return _wanted(cu, rows, sequence_length, cp, order, window).matrix()


def tokens_received(sent: Int64, *, fetches: int = 1, gradients: bool = True) -> Int64:
    """Tokens whose keys and values, or gradients of them, each rank receives in one layer: [cp].

    Args:
        sent: of ``tokens_sent``.
        fetches: how often keys are fetched: once, and once more if backward fetches them again or recomputes the layer.
        gradients: whether there is a backward, in which the gradients come back to the keys' owners.
    """
    received: Int64 = fetches * sent.sum(axis=0) + int(gradients) * sent.sum(axis=1)
    return received


def make_plan(
    cu_seqlens: npt.ArrayLike, rows: int, sequence_length: int, cp: int, rank: int, order: Order, window: Window
) -> Plan:
    """The plan of ``rank`` for the layers with ``window``.

    Args:
        cu_seqlens: [documents + 1] boundaries of the documents of the whole flattened micro-batch; row ends are among them.
        rows, sequence_length: of the micro-batch.

    Raises:
        ValueError: boundaries that do not fit; a length that ``layout.chunk_length`` refuses.
    """
    cu = _checked(cu_seqlens, rows, sequence_length)
    wanted = _wanted(cu, rows, sequence_length, cp, order, window)
    own = local_index(rank, cp, rows, sequence_length, order)
    mine = wanted.owner == rank
    by_source = np.argsort(wanted.owner, kind="stable")
    received = ranges(wanted.start[rank, by_source], wanted.stop[by_source])
    place = np.empty(rows * sequence_length, dtype=np.int64)  # of a position, among own and received tokens
    place[own] = np.arange(len(own))
    place[received] = len(own) + np.arange(len(received))

    held = stretches(rank, cp, rows, sequence_length, order)
    bounds = np.unique(np.concatenate([cu, held.ravel()]))
    q_start, stop = bounds[:-1], bounds[1:]
    here = mine[q_start // chunk_length(cp, sequence_length, order)]
    q_start, stop = q_start[here], stop[here]
    k_start = q_start.copy()  # where a document starts, nothing before is needed
    k_start[np.searchsorted(q_start, held[:, 0])] = _first_keys(cu, held[:, 0], window)
    pick = place[ranges(k_start, stop)]

    # A token is a key at most twice: with its own stretch, and with the rank's other stretch of the row.
    first_use = np.empty(len(own) + len(received), dtype=np.int64)
    first_use[pick[::-1]] = np.arange(len(pick))[::-1]
    second_use = np.flatnonzero(first_use[pick] != np.arange(len(pick)))
    return Plan(
        rank=rank,
        sent=wanted.matrix(),
        send=place[ranges(wanted.start[:, mine].ravel(), np.tile(wanted.stop[mine], cp))],
        pick=pick,
        cu_q=_cumulative(stop - q_start),
        cu_k=_cumulative(stop - k_start),
        first_use=first_use,
        reused=pick[second_use],
        second_use=second_use,
    )


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What each rank wants of each chunk of the micro-batch: its end, ``[start[rank, chunk], stop[chunk])``; maybe empty."""

    start: Int64  # [cp, chunks]
    stop: Int64  # [chunks]
    owner: Int64  # [chunks]

    def matrix(self) -> Int64:
        """See ``Plan.sent``."""
        tokens = self.stop - self.start
        return np.stack([tokens[:, self.owner == rank].sum(axis=1) for rank in range(len(tokens))])


def _wanted(cu: Int64, rows: int, sequence_length: int, cp: int, order: Order, window: Window) -> _Wanted:
    length = chunk_length(cp, sequence_length, order)
    chunk_start = np.arange(0, rows * sequence_length, length, dtype=np.int64)
    chunk_stop = chunk_start + length
    owner = np.tile(chunk_owners(cp, order), rows)
    start = np.empty((cp, len(owner)), dtype=np.int64)
    for rank in range(cp):
        begins = stretches(rank, cp, rows, sequence_length, order)[:, :1]
        first = _first_keys(cu, begins[:, 0], window)[:, None]
        # [stretches, chunks]; no document crosses a row's end, so rows need no care
        ends = np.where(chunk_stop <= begins, np.clip(first, chunk_start, chunk_stop), chunk_stop)
        start[rank] = np.where(owner == rank, chunk_stop, ends.min(axis=0))
    return _Wanted(start, chunk_stop, owner)


def _first_keys(cu: Int64, begins: Int64, window: Window) -> Int64:
    """The first key that the tokens from each of ``begins`` on need: [begins]."""
    documents = cu[np.searchsorted(cu, begins, side="right") - 1]
    needed = [fetched_range(b, d, window)[0] for b, d in zip(begins.tolist(), documents.tolist())]
    return np.array(needed, dtype=np.int64)


def _cumulative(lengths: Int64) -> Int64:
    return np.concatenate([[0], np.cumsum(lengths)])


def _checked(cu_seqlens: npt.ArrayLike, rows: int, sequence_length: int) -> Int64:
    """The boundaries as int64, without empty documents."""
    cu = np.unique(np.asarray(cu_seqlens, dtype=np.int64))
    ends = np.arange(rows + 1, dtype=np.int64) * sequence_length
    if np.any(np.diff(np.asarray(cu_seqlens)) < 0) or cu[0] != 0 or cu[-1] != ends[-1] or not np.isin(ends, cu).all():
        raise ValueError(
            f"cu_seqlens must rise from 0 to {ends[-1]} and hold the end of each of {rows} rows of {sequence_length} tokens"
        )
    return cu
