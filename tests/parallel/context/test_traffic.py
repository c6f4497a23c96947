"""What the exchanges move, hold and overlap."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_zebra.parallel.context import attend as attend_module
from megatron_zebra.parallel.context.exchange import Fetch
from megatron_zebra.parallel.context.layout import ORDERS
from megatron_zebra.parallel.context.plan import tokens_received, tokens_sent
from megatron_zebra.parallel.context.shard import ContextParallel
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group
from tests.parallel.context.cases import Whole

WINDOW = 24
GROUPS = (1, 2, 4, 8)
KERNEL_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
LENGTHS = [1024, 2048, 4096, 8192]


def received(grid: Grid) -> dict[tuple[str, int], tuple[float, float]]:
    """Tokens of K,V received in a local layer's forward, and of their gradients in its backward, by order and length."""
    found = {}
    for order in ORDERS:
        for length in LENGTHS:
            whole = Whole.make([0, length], 1, length, heads=(2, 1), head_dim=4, dtype=torch.float32)
            shard = whole.shard(ContextParallel(grid.cp, order))
            q, k, v, d_out = (x[shard.local_index].requires_grad_() for x in whole.tensors)
            grid.traffic.reset()
            out = attend_module.attend(q, k, v, shard, window=WINDOW, backend="cpu")
            forward = grid.traffic.bytes["cp local"]
            out.backward(d_out)
            both = grid.traffic.bytes["cp local"]
            assert set(grid.traffic.bytes) == {"cp local"}
            token = 2 * 1 * 4 * 4
            found[order, length] = (forward / token, (both - forward) / token)
    return found


@pytest.mark.parametrize("cp", [2, 4])
def test_bytes_of_a_local_layer_do_not_grow_with_the_sequence_P08(run_distributed, cp: int) -> None:
    by_rank = run_distributed(received, cp, cp=cp)
    for rank, found in enumerate(by_rank):
        for order, most in (("contiguous", WINDOW), ("zigzag", 2 * WINDOW)):
            assert len({found[order, length] for length in LENGTHS}) == 1
            assert max(found[order, LENGTHS[0]]) <= most
            sent = tokens_sent([0, 1024], 1, 1024, cp, order, WINDOW)
            assert found[order, 1024] == (sent[:, rank].sum(), sent[rank].sum())
            assert sum(found[order, 1024]) == tokens_received(sent)[rank]
    busiest = {order: max(found[order, 1024][0] for found in by_rank) for order in ORDERS}
    assert busiest == {"contiguous": WINDOW, "zigzag": WINDOW if cp == 2 else 2 * WINDOW}


class Held:
    """Bytes of the tensors it was told of that live at the same time, and the most of them so far."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def add(self, x: torch.Tensor) -> None:
        self.storages = {at: (r, size) for at, (r, size) in self.storages.items() if not r.expired()}
        storage = x.untyped_storage()
        reference = StorageWeakRef(storage)
        self.storages[reference.cdata] = reference, storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.storages.values()))


class ViaCopy:
    """Work on copies: gloo's threads let go of a tensor only some time after it was waited for."""

    def __init__(self, work: dist.Work | None, arrived: torch.Tensor, out: torch.Tensor) -> None:
        self.work, self.arrived, self.out = work, arrived, out

    def wait(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.out.copy_(self.arrived)


@contextmanager
def held() -> Iterator[tuple[Held, Held]]:
    """What fetched keys take, received and as the kernel reads them; and what all exchanges take beside these."""
    keys, everything = Held(), Held()
    finish, exchange = Fetch.finish, Group.all_to_all

    def watch_finish(fetch: Fetch) -> torch.Tensor:
        rows = fetch.rows
        found = finish(fetch)
        for one in (keys, everything):
            one.add(rows)
            one.add(found)
        return found

    def watch_exchange(group: Group, x: torch.Tensor, send, receive, out: torch.Tensor, label: str):
        everything.add(x)
        everything.add(out)
        arrived = torch.empty_like(out)
        return ViaCopy(exchange(group, x.clone(), send, receive, arrived, label), arrived, out)

    with patch.object(Fetch, "finish", watch_finish), patch.object(Group, "all_to_all", watch_exchange):
        yield keys, everything


def peaks(grid: Grid) -> dict[tuple[int, bool], tuple[int, int]]:
    """Most bytes of fetched keys, and of all exchanges, in a global layer of 8 KV heads; by head groups and keep_fetched."""
    length, found = 64 * grid.cp.size, {}
    whole = Whole.make([0, length], 1, length, heads=(8, 8))
    for groups in GROUPS:
        for keep in (False, True):
            shard = whole.shard(ContextParallel(grid.cp, head_groups=groups, keep_fetched=keep))
            with held() as (keys, everything):
                whole.part(shard, None)
            found[groups, keep] = keys.most, everything.most
    return found


def test_the_peak_of_fetched_keys_falls_as_one_over_the_head_groups(run_distributed) -> None:
    for found in run_distributed(peaks, 2, cp=2):
        keys = {groups: found[groups, False][0] for groups in GROUPS}
        assert [keys[1] / keys[groups] for groups in GROUPS] == list(GROUPS)
        assert found[8, False][1] == found[4, False][1] / 2  # with few groups, a larger share is under way at once
        assert found[8, True][0] > 4 * keys[8]  # the keys of all groups are kept


def traced(grid: Grid, keep: bool) -> str:
    """What began in forward and backward of a global layer of 4 head groups: X an exchange, F attention, B its backward."""
    length = 64 * grid.cp.size
    whole = Whole.make([0, length], 1, length, heads=(8, 4))
    shard = whole.shard(ContextParallel(grid.cp, head_groups=4, keep_fetched=keep))
    kernel = attend_module.attention

    def marked(*args, **options):
        with record_function("attention"):
            return kernel(*args, **options)

    with patch.object(attend_module, "attention", marked), profile(activities=[ProfilerActivity.CPU]) as trace:
        whole.part(shard, None)
    letters = {"c10d::alltoall_base_": "X", "attention": "F", KERNEL_BACKWARD: "B"}
    began = sorted((event.time_range.start, letters[event.name]) for event in trace.events() if event.name in letters)
    # A backward is several calls of the kernel; what it needs is fetched before the first.
    return re.sub("B+", "B", "".join(letter for _, letter in began))


def traces(grid: Grid) -> list[str]:
    return [traced(grid, keep) for keep in (False, True)]


def test_exchanges_of_one_head_group_run_while_another_is_attended_to(run_distributed) -> None:
    for fetched_again, kept in run_distributed(traces, 2, cp=2):
        # Forward: the keys of group 0; then those of the next group are sent for before attention to this one begins.
        forward = "X" + "XF" * 3 + "F"
        assert kept[: len(forward)] == fetched_again[: len(forward)] == forward
        # Backward: gradients of a group go home while the next is computed; nothing waits for them until the end.
        assert kept[len(forward) :] == "BX" * 4
        # Fetched again: as in forward, the next group's keys are sent for before this group's backward begins.
        assert fetched_again[len(forward) :] == "X" + "XBX" * 3 + "BX"
