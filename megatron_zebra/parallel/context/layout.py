"""Which tokens of a micro-batch each context-parallel rank holds. Pure: no torch.

A micro-batch is ``rows`` rows of ``sequence_length`` tokens, flattened row after row. Every row is cut into equal chunks:

* ``zigzag``: 2·cp of them; rank r holds chunks r and 2·cp - 1 - r, so that all ranks have the same causal work;
* ``contiguous``: cp of them; rank r holds chunk r.

A rank keeps its tokens in the order of their positions.
"""

from typing import Literal, get_args

import numpy as np

from megatron_zebra.attention.window import Int64

Order = Literal["zigzag", "contiguous"]
ORDERS: tuple[Order, ...] = get_args(Order)


def chunk_owners(cp: int, order: Order) -> Int64:
    """The rank that holds each chunk of a row: [chunks of a row]."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r} does not exist; allowed: {', '.join(ORDERS)}")
    ranks = np.arange(cp, dtype=np.int64)
    # One rank holds all of a row, which then may have any length.
    return ranks if order == "contiguous" or cp == 1 else np.concatenate([ranks, ranks[::-1]])


def chunk_length(cp: int, sequence_length: int, order: Order) -> int:
    """Tokens of a chunk; ValueError if a row cannot be cut into equal ones."""
    chunks = len(chunk_owners(cp, order))
    if sequence_length < chunks or sequence_length % chunks:
        raise ValueError(
            f"a sequence of {sequence_length} tokens cannot be cut for {cp} context-parallel ranks in {order} order: "
            f"its length must be a multiple of {chunks}"
        )
    return sequence_length // chunks


def owned_spans(rank: int, cp: int, rows: int, sequence_length: int, order: Order) -> Int64:
    """(start, stop) of each chunk that ``rank`` holds, in the flattened micro-batch, ascending: [chunks, 2]."""
    length = chunk_length(cp, sequence_length, order)
    chunks = np.flatnonzero(chunk_owners(cp, order) == rank)
    starts = (np.arange(rows)[:, None] * sequence_length + chunks * length).ravel()
    return np.stack([starts, starts + length], axis=1)


def local_index(rank: int, cp: int, rows: int, sequence_length: int, order: Order) -> Int64:
    """Positions in the flattened micro-batch of the tokens that ``rank`` holds, ascending: [tokens]."""
    return ranges(*owned_spans(rank, cp, rows, sequence_length, order).T)


def stretches(rank: int, cp: int, rows: int, sequence_length: int, order: Order) -> Int64:
    """``owned_spans`` with those joined that touch: [stretches, 2]."""
    spans = owned_spans(rank, cp, rows, sequence_length, order)
    apart = spans[1:, 0] != spans[:-1, 1]
    return np.stack([spans[np.append(True, apart), 0], spans[np.append(apart, True), 1]], axis=1)


def ranges(starts: Int64, stops: Int64) -> Int64:
    """``arange(start, stop)`` of each pair, one after another; start <= stop."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - before, lengths)
