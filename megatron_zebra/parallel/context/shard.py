"""One micro-batch as one context-parallel rank sees it: its tokens, and for each window a plan and its kernel segments."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window
from megatron_zebra.parallel.context.exchange import Exchange
from megatron_zebra.parallel.context.layout import ORDERS, Order, local_index
from megatron_zebra.parallel.context.plan import make_plan
from megatron_zebra.parallel.group import Group


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """How the ranks of ``group`` share a sequence.

    ``head_groups``: global layers fetch their KV heads in so many parts, each while the one before is attended to.
    ``keep_fetched``: global layers keep fetched keys for backward, rather than fetch them again. Set it where attention is
    recomputed in backward: nothing is kept then, and the second fetch would be a third.
    """

    group: Group
    order: Order = "zigzag"
    head_groups: int = 1
    keep_fetched: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} does not exist; allowed: {', '.join(ORDERS)}")
        if self.head_groups < 1:
            raise ValueError(f"head_groups must be at least 1, not {self.head_groups}")


def traffic_label(window: Window) -> str:
    """The name under which a layer's exchanges are counted."""
    return "cp global" if window is None else "cp local"


class ContextShard:
    """Takes the place of ``Segments`` in the decoder: it is given to every layer, which asks it for its window's exchange.

    ``local_index``: int64 [T] on the host, positions of this rank's tokens in the flattened micro-batch.
    """

    def __init__(
        self,
        cu_seqlens: npt.ArrayLike,
        rows: int,
        sequence_length: int,
        context: ContextParallel,
        device: torch.device | str,
    ) -> None:
        """See ``plan.make_plan`` for the arguments and errors."""
        self.context, self.device = context, torch.device(device)
        self.cu_seqlens, self.rows, self.sequence_length = np.asarray(cu_seqlens), rows, sequence_length
        group = context.group
        self.local_index = local_index(group.rank, group.size, rows, sequence_length, context.order)
        self._by_window: dict[Window, tuple[Exchange, Segments]] = {}

    def by_window(self, window: Window) -> tuple[Exchange, Segments]:
        """What layers with this window fetch, and the segments of their kernel's call; made at the first call."""
        if window not in self._by_window:
            group = self.context.group
            plan = make_plan(
                self.cu_seqlens,
                self.rows,
                self.sequence_length,
                group.size,
                group.rank,
                self.context.order,
                window,
            )
            segments = Segments.from_cu_seqlens(plan.cu_q, plan.cu_k, self.device)
            self._by_window[window] = Exchange(plan, group, traffic_label(window), self.device), segments
        return self._by_window[window]
