"""The window convention, and every border where it is written down otherwise. Pure: no torch.

A layer has a window ``w``, an int, or None:

* ``w``: the query at position p sees keys ``p - w .. p``, itself included: **w + 1 keys**. ``w < 1`` is an error.
* ``None``: full causal attention, keys ``0 .. p``.

Positions count from the start of the query's own segment (document), and stop there. Of a segment whose queries are
fewer than its keys, the queries are the *last* ones (aligned bottom-right): query i of Lq has position ``Lk - Lq + i``.
"""

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Window = int | None
Int64 = npt.NDArray[np.int64]
Lengths = Sequence[int] | npt.NDArray[np.integer]


def check_window(window: object) -> Window:
    """Return ``window`` as a plain int or None; a pair, a float, a bool or anything below 1 is an error."""
    if window is None:
        return None
    try:
        if isinstance(window, bool):
            raise TypeError
        w = operator.index(window)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"window must be an int (w: w + 1 keys, self included) or None (full), not {window!r}"
        ) from None
    if w < 1:
        raise ValueError(f"window must be at least 1 (None means full attention), not {w}")
    return w


def effective_window(window: Window, longest: int) -> Window:
    """``window``, or None where it hides no key from any query of a segment of ``longest`` keys."""
    w = check_window(window)
    return None if w is None or w >= longest - 1 else w


# --- what a query sees ------------------------------------------------------------------------------------------------


def visible_range(position: int, window: Window) -> tuple[int, int]:
    """Keys ``[start, stop)`` that the query at ``position`` of its segment sees."""
    w = check_window(window)
    return (0 if w is None else max(0, position - w)), position + 1


def visible_keys(position: npt.ArrayLike, window: Window) -> Int64:
    """How many keys the query at each position sees; any shape in, the same out."""
    w = check_window(window)
    p = np.asarray(position, dtype=np.int64)
    return p + 1 if w is None else np.minimum(p, w) + 1


def fetched_range(chunk_start: int, document_start: int, window: Window) -> tuple[int, int]:
    """Keys ``[start, stop)`` *before* a chunk that its queries see, where the chunk's first token is of the document.

    All three are positions of one sequence. The range ends where the chunk starts.
    """
    w = check_window(window)
    return (document_start if w is None else max(document_start, chunk_start - w)), chunk_start


def _pairs_of_prefix(n: Int64, window: Window) -> Int64:
    """Pairs that the first n queries of a segment see: ``sum(visible_keys(range(n)))``, in closed form."""
    if window is None:
        return n * (n + 1) // 2
    ramp = np.minimum(n, window + 1)
    return ramp * (ramp + 1) // 2 + (n - ramp) * (window + 1)


def allowed_pairs(q_lengths: Lengths, k_lengths: Lengths | None = None, window: Window = None) -> int:
    """Exact number of (query, key) pairs that the mask allows over packed segments.

    q_lengths, k_lengths: [segments]; k_lengths None means the same. One head.
    """
    w = check_window(window)
    q = np.asarray(q_lengths, dtype=np.int64)
    k = q if k_lengths is None else np.asarray(k_lengths, dtype=np.int64)
    if q.shape != k.shape or np.any(q > k) or np.any(q < 0):
        raise ValueError("each segment needs 0 <= queries <= keys")
    return int(np.sum(_pairs_of_prefix(k, w) - _pairs_of_prefix(k - q, w)))


# --- the borders ------------------------------------------------------------------------------------------------------


def flash_window(window: Window) -> tuple[int, int]:
    """flash-attn 2 and 3, torch's varlen_attn: ``window_size=(left, right)``; -1 is unbounded."""
    w = check_window(window)
    return (-1, 0) if w is None else (w, 0)


def flash4_window(window: Window) -> tuple[int | None, int | None]:
    """flash-attn 4 (``flash_attn.cute``): unbounded is None; it does not read -1 as unbounded."""
    w = check_window(window)
    return (None, None) if w is None else (w, 0)


def to_hf(window: Window) -> int | None:
    """Hugging Face ``sliding_window`` (and llama.cpp ``n_swa``): the number of keys, self included."""
    w = check_window(window)
    return None if w is None else w + 1


def from_hf(sliding_window: int | None) -> Window:
    """The window that a Hugging Face ``sliding_window`` means; 1 key (self alone) has no window here."""
    if sliding_window is None:
        return None
    if isinstance(sliding_window, bool) or sliding_window < 2:
        raise ValueError(f"sliding_window must be at least 2 keys, self included, or null, not {sliding_window!r}")
    return sliding_window - 1


def to_megatron(window: Window) -> tuple[int, int] | None:
    """Megatron-LM ``--window-size left,right``."""
    w = check_window(window)
    return None if w is None else (w, 0)


def from_megatron(window_size: Sequence[int] | None) -> Window:
    """The window that Megatron-LM's ``(left, right)`` means under a causal mask."""
    if window_size is None:
        return None
    left, right = window_size
    if right not in (0, -1):
        raise ValueError(f"window_size {tuple(window_size)}: only causal windows (left, 0) are known here")
    return None if left == -1 else check_window(left)
