"""Attention under context parallelism is that of one process: outputs and all gradients, in fp64."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_zebra.attention.segments import Segments
from megatron_zebra.parallel.context.attend import attend
from megatron_zebra.parallel.context.layout import ORDERS, chunk_length
from megatron_zebra.parallel.context.plan import tokens_received, tokens_sent
from megatron_zebra.parallel.context.shard import ContextParallel, traffic_label
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group
from tests.parallel.context.cases import Whole, boundaries, error, ragged

EXACT = 1e-12
CHUNK = 6  # of zigzag; contiguous ones are twice as long


def against_one_process(grid: Grid) -> tuple[float, int]:
    """Worst error over all cases on this rank, and the number of cases. Bytes are compared on the way."""
    worst, cases, cp = 0.0, 0, grid.cp.size
    length = 2 * cp * CHUNK
    layouts = [ContextParallel(grid.cp, order) for order in ORDERS]
    globals_ = [replace(c, head_groups=g, keep_fetched=keep) for c in layouts for g in (1, 2) for keep in (False, True)]
    for rows, cuts in ((1, 0), (1, 1), (1, 3), (2, 0), (2, 7), (1, 20), (3, 40)):
        whole = Whole.make(ragged(rows, length, cuts, seed=cuts), rows, length)
        for context in layouts:
            shard, chunk = whole.shard(context), chunk_length(cp, length, context.order)
            for window in (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 3, length - 1, length + 5):
                before = grid.traffic.bytes["cp local"]
                worst = max(worst, error(whole.part(shard, window), whole.reference(window), shard.local_index))
                assert grid.traffic.bytes["cp local"] - before == expected_bytes(whole, context, window)
                cases += 1
        right = whole.reference(None)
        for context in globals_:
            before = grid.traffic.bytes["cp global"]
            shard = whole.shard(context)
            worst = max(worst, error(whole.part(shard, None), right, shard.local_index))
            assert grid.traffic.bytes["cp global"] - before == expected_bytes(whole, context, None)
            cases += 1
    return worst, cases


def expected_bytes(whole: Whole, context: ContextParallel, window: int | None) -> int:
    """Bytes that this rank should receive in forward and backward."""
    group, k = context.group, whole.tensors[1]
    sent = tokens_sent(whole.cu, whole.rows, whole.length, group.size, context.order, window)
    fetches = 1 if window is not None or context.keep_fetched else 2
    return int(tokens_received(sent, fetches=fetches)[group.rank]) * 2 * k[0].numel() * k.element_size()


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process_P03_P07_P09(run_distributed, cp: int) -> None:
    for worst, cases in run_distributed(against_one_process, cp, cp=cp):
        assert cases == 7 * (2 * 7 + 8)
        assert worst <= EXACT
