"""Carrying out a plan: keys and values fetched from their owners, and their gradients returned, in one all-to-all each.

In autograd a fetch is two nodes, so that gradients can travel while other groups of heads are still computed:

    k, v ── Lend ──┬── Arrive (heads 0) ── attention ──
                   └── Arrive (heads 1) ── attention ──

The backward of an ``Arrive`` starts the return of its gradients; that of ``Lend``, which comes last, waits for them all and
adds them up. The own keys go through both, so a rank that fetches nothing still takes part in every return.

All sums run in a fixed order: the uses of a token on one rank, then the ranks it was lent to, ascending.
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
        self._rows: torch.Tensor | None = k.new_empty((own + exchange.plan.received, 2, *k.shape[1:]))
        torch.stack((k, v), 1, out=self._rows[:own])
        self._sent: torch.Tensor | None = self._rows.index_select(0, exchange.send)
        self._work = exchange.send_keys(self._sent, self._rows[own:])

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """Wait, and return the kernel's keys and values: [keys, 2, heads, D]. Only once: what was received is freed."""
        assert self._rows is not None, "fetched twice"
        self.exchange.group.wait(self._work)
        keys = self._rows.index_select(0, self.exchange.pick)
        self._rows = self._sent = self._work = None
        return keys


@dataclass(frozen=True, eq=False)
class Return:
    """Gradients of lent keys and values under way to this rank: ``rows`` [sum(send_counts), 2, heads, D]."""

    exchange: Exchange
    heads: slice
    rows: torch.Tensor
    work: dist.Work | None
    sent: torch.Tensor  # lives until the work is done

    def add_to(self, d_k: torch.Tensor, d_v: torch.Tensor) -> None:
        """Wait, and add them to d_k, d_v [T, Hkv, D]."""
        self.exchange.group.wait(self.work)
        for lent in self.exchange.lent:
            tokens = self.exchange.send[lent]  # no token twice
            for i, gradient in enumerate((d_k, d_v)):
                gradient[tokens, self.heads] += self.rows[lent, i]


class Lend(torch.autograd.Function):
    """k, v [T, Hkv, D] -> the same. Backward adds what ``returns`` brings by then, in at least fp32, and empties it."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, returns: list[Return]) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.returns = returns
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_k: torch.Tensor, d_v: torch.Tensor) -> tuple[Any, ...]:
        wide = torch.promote_types(d_k.dtype, torch.float32)
        sum_k, sum_v = d_k.to(wide, copy=True), d_v.to(wide, copy=True)
        for returned in ctx.returns:
            returned.add_to(sum_k, sum_v)
        ctx.returns.clear()
        return sum_k.to(d_k.dtype), sum_v.to(d_v.dtype), None


class Arrive(torch.autograd.Function):
    """Own k, v [T, heads, D] and a ``Fetch`` of them -> the kernel's k, v [keys, heads, D], two views of one storage.

    Backward gives the gradients of the own use of own keys, and starts the return of the others' into ``returns``.
    """

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, fetch: Fetch, heads: slice, returns: list[Return]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.exchange, ctx.heads, ctx.returns, ctx.tokens = fetch.exchange, heads, returns, k.shape[0]
        keys = fetch.finish()
        return keys[:, 0], keys[:, 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_k: torch.Tensor, d_v: torch.Tensor) -> tuple[Any, ...]:
        exchange: Exchange = ctx.exchange

        def used(use: torch.Tensor) -> torch.Tensor:
            return torch.stack((d_k.index_select(0, use), d_v.index_select(0, use)), 1)

        rows = used(exchange.first_use)
        if len(exchange.reused):
            rows[exchange.reused] += used(exchange.second_use)
        own, sent = rows[: ctx.tokens], rows[ctx.tokens :]
        out = rows.new_empty((len(exchange.send), *rows.shape[1:]))
        work = exchange.return_gradients(sent, out)
        ctx.returns.append(Return(exchange, ctx.heads, out, work, sent))
        return own[:, 0], own[:, 1], None, None, None
