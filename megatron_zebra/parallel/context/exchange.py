"""Carrying out a plan: keys and values fetched from their owners, and their gradients returned, in one all-to-all each.

In autograd a fetch is two nodes, so that gradients travel while other groups of heads are still computed:

    k, v ── Lend ── ticket ──┬── Arrive (heads 0) ── attention ──
                             └── Arrive (heads 1) ── attention ──

The backward of an ``Arrive`` starts the return of its gradients, that of ``Lend``, which comes last, waits for them; the
ticket, an empty tensor, sees to that order. So a rank that fetches nothing still takes part in every return.

All sums run in a fixed order: the uses of a token on its own rank, then the ranks it was lent to, ascending.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_zebra.attention.window import Int64
from megatron_zebra.parallel.context.plan import Plan
from megatron_zebra.parallel.group import Group


class Exchange:
    """A plan on a device: its index tensors, made once and shared by all layers.

    ``label`` is the name under which ``group`` counts the bytes.
    """

    def __init__(self, plan: Plan, group: Group, label: str, device: torch.device) -> None:
        def index(values: Int64) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        self.plan, self.group, self.label = plan, group, label
        self.send_counts, self.receive_counts = plan.send_counts, plan.receive_counts
        self.send, self.pick = index(plan.send), index(plan.pick)
        self.first_use, self.reused, self.second_use = map(index, (plan.first_use, plan.reused, plan.second_use))
        bounds = np.cumsum([0, *self.send_counts])
        self.lent = [slice(a, b) for a, b in zip(bounds.tolist(), bounds[1:].tolist()) if a < b]  # by destination

    def send_keys(self, rows: torch.Tensor, out: torch.Tensor) -> dist.Work | None:
        """Start sending ``rows`` [sum(send_counts), ...] into the others' ``out`` [sum(receive_counts), ...]."""
        return self._start(rows, out, self.send_counts, self.receive_counts)

    def return_gradients(self, rows: torch.Tensor, out: torch.Tensor) -> dist.Work | None:
        """Start sending ``rows`` [sum(receive_counts), ...] back into their owners' ``out`` [sum(send_counts), ...]."""
        return self._start(rows, out, self.receive_counts, self.send_counts)

    def _start(self, rows: torch.Tensor, out: torch.Tensor, send: list[int], receive: list[int]) -> dist.Work | None:
        if not self.plan.anything_sent:
            return None
        return self.group.all_to_all(rows, send, receive, out, self.label)


class Fetch:
    """Keys and values under way to this rank: k, v [T, heads, D] of its own tokens, sent to the ranks that want them."""

    @torch.no_grad()
    def __init__(self, exchange: Exchange, k: torch.Tensor, v: torch.Tensor) -> None:
        self.exchange = exchange
        own = k.shape[0]
        self.rows: torch.Tensor | None = k.new_empty((own + exchange.plan.received, 2, *k.shape[1:]))
        torch.stack((k, v), 1, out=self.rows[:own])
        self._sent: torch.Tensor | None = self.rows.index_select(0, exchange.send)
        self._work = exchange.send_keys(self._sent, self.rows[own:])

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """Wait, and return the kernel's keys and values: [keys, 2, heads, D]. Only once: what was received is freed."""
        assert self.rows is not None, "fetched twice"
        self.exchange.group.wait(self._work)
        self._work = self._sent = None
        keys = self.rows.index_select(0, self.exchange.pick)
        self.rows = None
        return keys


@dataclass(frozen=True, eq=False)
class _Coming:
    """Gradients under way to the owner of lent keys: ``rows`` [sum(send_counts), 2, heads, D]."""

    heads: slice
    rows: torch.Tensor
    work: dist.Work | None
    sent: torch.Tensor  # lives until the work is done


class Returns:
    """The gradients of one layer's own keys and values, as they come together in backward.

    One return is under way at a time, while the next group of heads is computed. Sums are in at least fp32.
    """

    def __init__(self, exchange: Exchange, k: torch.Tensor) -> None:
        """``k``: [T, Hkv, D] of all heads."""
        self.exchange = exchange
        tokens, *rest = k.shape
        self._tokens, self._shape, self._dtype = tokens, (tokens, 2, *rest), k.dtype
        self._sum: torch.Tensor | None = None
        self._coming: _Coming | None = None

    def start(self, heads: slice, d_k: torch.Tensor, d_v: torch.Tensor) -> None:
        """Take in the gradients of the kernel's keys and values [keys, heads, D], and send others theirs."""
        exchange = self.exchange

        def used(use: torch.Tensor) -> torch.Tensor:
            return torch.stack((d_k.index_select(0, use), d_v.index_select(0, use)), 1)

        rows = used(exchange.first_use)
        if len(exchange.reused):
            rows[exchange.reused] += used(exchange.second_use)  # no token twice
        sent = rows[self._tokens :]
        out = rows.new_empty((len(exchange.send), *rows.shape[1:]))
        coming = _Coming(heads, out, exchange.return_gradients(sent, out), sent)
        if self._sum is None:
            self._sum = rows.new_empty(self._shape, dtype=torch.promote_types(self._dtype, torch.float32))
        self._sum[:, :, heads] = rows[: self._tokens]
        self._settle()
        self._coming = coming

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the last; d_k, d_v [T, Hkv, D]."""
        self._settle()
        assert self._sum is not None, "nothing was started"
        d_k, d_v = self._sum.to(self._dtype).unbind(1)
        self._sum = None
        return d_k, d_v

    def _settle(self) -> None:
        if self._coming is None:
            return
        coming, self._coming = self._coming, None
        self.exchange.group.wait(coming.work)
        assert self._sum is not None
        for lent in self.exchange.lent:
            self._sum[self.exchange.send[lent], :, coming.heads] += coming.rows[lent]  # no token twice


class Lend(torch.autograd.Function):
    """k, v [T, Hkv, D] -> a ticket for every ``Arrive`` of them; backward gives what ``returns`` has brought by then."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, returns: Returns) -> torch.Tensor:
        ctx.returns = returns
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ticket: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.returns.finish(), None


class Arrive(torch.autograd.Function):
    """A ticket and a ``Fetch`` of ``heads`` -> the kernel's k, v [keys, heads, D], two views of one storage."""

    @staticmethod
    def forward(
        ctx: Any, ticket: torch.Tensor, fetch: Fetch, heads: slice, returns: Returns
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.heads, ctx.returns = heads, returns
        keys = fetch.finish()
        return keys[:, 0], keys[:, 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_k: torch.Tensor, d_v: torch.Tensor) -> tuple[Any, ...]:
        ctx.returns.start(ctx.heads, d_k, d_v)
        return d_k.new_zeros(0), None, None, None
