"""Attention under context parallelism is that of one process: outputs and all gradients, in fp64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_zebra.attention.segments import Segments
from megatron_zebra.parallel.context.attend import attend
from megatron_zebra.parallel.context.layout import ORDERS, chunk_length
from megatron_zebra.parallel.context.plan import tokens_received, tokens_sent
from megatron_zebra.parallel.context.shard import ContextParallel, ContextShard, traffic_label
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.group import Group
from tests.parallel.context.cases import Whole, boundaries, error, ragged

Layer = Callable[..., torch.Tensor]
EXACT = 1e-12
CHUNK = 6  # of zigzag; contiguous ones are twice as long


def against_one_process(grid: Grid) -> tuple[float, int]:
    """Worst error over all cases on this rank, and the number of cases. Bytes are compared on the way."""
    worst, cases, cp = 0.0, 0, grid.cp.size
    length = 2 * cp * CHUNK
    layouts = [ContextParallel(grid.cp, order) for order in ORDERS]
    globals_ = [replace(c, head_groups=g, keep_fetched=keep) for c in layouts for g in (1, 2) for keep in (False, True)]
    for rows, cuts in ((1, 0), (1, 3), (2, 7), (1, 20), (3, 40)):
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
        assert cases == 5 * (2 * 7 + 8)
        assert worst <= EXACT


def moved(whole: Whole, shard: ContextShard, window: int, key: int) -> list[int]:
    """Positions of this rank's tokens whose output changes, in any bit, with the key and value at ``key``."""
    q, k, v, _ = whole.tensors

    def output() -> torch.Tensor:
        own = [x[shard.local_index] for x in (q, k, v)]
        return attend(*own, shard, window=window, backend="cpu")

    before = output()
    k[key] += 1
    v[key] += 1
    after = output()
    return shard.local_index[(before != after).flatten(1).any(1).numpy()].tolist()


def perturbed(grid: Grid) -> list[tuple[str, int, int, list[int]]]:
    """(order, window, key, positions of this rank that it moves) for every key."""
    result = []
    for order in ORDERS:
        whole = Whole.make([0, 17, 24], 1, 24)
        shard = whole.shard(ContextParallel(grid.cp, order))
        for window in (2, 7):
            with torch.no_grad():
                result += [(order, window, key, moved(whole, shard, window, key)) for key in range(24)]
    return result


def test_a_key_moves_the_outputs_up_to_distance_w_and_no_other_P01_P02(run_distributed) -> None:
    for cases in zip(*run_distributed(perturbed, 3, cp=3), strict=True):
        _, window, key, _ = cases[0]
        end = 17 if key < 17 else 24
        assert sorted(p for case in cases for p in case[3]) == list(range(key, min(key + window + 1, end))), cases[0]


def other_heads_and_dtypes(grid: Grid) -> dict[str, float]:
    """Worst errors of what the long list of cases leaves out, by name."""
    found = {}
    length = 4 * grid.cp.size * 3
    cu = ragged(2, length, 5, seed=3)
    cases = {"mha": ((3, 3), 3), "mqa": ((4, 1), 1), "gqa": ((8, 2), 2)}
    wholes = {name: Whole.make(cu, 2, length, heads) for name, (heads, _) in cases.items()}
    shards = {name: whole.shard(ContextParallel(grid.cp, head_groups=cases[name][1])) for name, whole in wholes.items()}
    for window in (5, None):  # the models take turns
        for name, whole in wholes.items():
            found[f"{name} {window}"] = error(
                whole.part(shards[name], window), whole.reference(window), shards[name].local_index
            )
        whole = wholes["gqa"]
        ours = whole.part(shards["gqa"], window, "reference")
        found[f"reference kernel {window}"] = error(ours, whole.reference(window), shards["gqa"].local_index)
    return found


def test_any_heads_and_any_kernel_P10_P11(run_distributed) -> None:
    for found in run_distributed(other_heads_and_dtypes, 4, cp=4):
        assert len(found) == 8
        assert {name: e for name, e in found.items() if e > EXACT} == {}


def low_precision(grid: Grid) -> list[tuple[float, float, bool]]:
    """For fp32 and bf16: error, that of one process, and whether a second time gives the same bits."""
    found = []
    length = 16 * grid.cp.size
    for dtype in (torch.float32, torch.bfloat16):
        exact, whole = (Whole.make([0, length], 1, length, dtype=t) for t in (torch.float64, dtype))
        context = ContextParallel(grid.cp)
        shard, everything = whole.shard(context), np.arange(length)
        for window in (5, None):
            ours, right = whole.part(shard, window), exact.reference(window)
            again = whole.part(shard, window)
            found.append(
                (
                    error(ours, right, shard.local_index),
                    error(whole.reference(window), right, everything),
                    all(map(torch.equal, ours, again)),
                )
            )
    return found


def test_low_precision_is_as_good_as_in_one_process_and_repeats_bit_for_bit(run_distributed) -> None:
    for found in run_distributed(low_precision, 3, cp=3):
        for ours, one_process, repeated in found:
            assert ours <= 2 * one_process
            assert repeated


def documents_alone(grid: Grid) -> float:
    """Worst difference of a packed document from the same document alone in its row."""
    lengths, worst = [5, 3, 9, 1, 2], 0.0
    cu = boundaries(lengths)
    whole = Whole.make(cu, 1, 20)
    for order in ORDERS:
        shard = whole.shard(ContextParallel(grid.cp, order))
        for window in (2, None):
            out = whole.part(shard, window)[0]
            for a, b in pairwise(cu):
                alone = Whole(np.array([0, b - a]), 1, int(b - a), tuple(x[a:b] for x in whole.tensors))
                here = (shard.local_index >= a) & (shard.local_index < b)
                if here.any():
                    worst = max(worst, error([out[here]], alone.reference(window)[:1], shard.local_index[here] - a))
    return worst


def test_packed_documents_are_as_each_alone_K01_K03(run_distributed) -> None:
    assert max(run_distributed(documents_alone, 2, cp=2)) <= EXACT


def plain(layer: Layer, leaves: list[torch.Tensor], d_out: torch.Tensor) -> torch.Tensor:
    out = layer(*leaves)
    out.backward(d_out)
    return out


def without_gradients(layer: Layer, leaves: list[torch.Tensor], d_out: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(*leaves)


def backward_twice(layer: Layer, leaves: list[torch.Tensor], d_out: torch.Tensor) -> torch.Tensor:
    out = layer(*leaves)
    out.backward(d_out / 2, retain_graph=True)
    out.backward(d_out / 2)
    return out


def recomputed(layer: Layer, leaves: list[torch.Tensor], d_out: torch.Tensor) -> torch.Tensor:
    out = checkpoint(lambda *x: layer(*(y.exp().log() for y in x)), *leaves, use_reentrant=False)
    out.backward(d_out)
    return out


def recomputed_reentrant(layer: Layer, leaves: list[torch.Tensor], d_out: torch.Tensor) -> torch.Tensor:
    out = checkpoint(layer, *leaves, use_reentrant=True)
    out.backward(d_out)
    return out


WAYS = [plain, without_gradients, backward_twice, recomputed, recomputed_reentrant]


def under_autograd(grid: Grid) -> list[tuple[str, bool, float, float, tuple[int, int]]]:
    """(way, keep_fetched, error, tokens received, (tokens fetched once, lent)) of each way to run a layer."""
    length, found = 8 * grid.cp.size, []
    whole = Whole.make([0, 3, length], 1, length)
    right = whole.reference(None)
    for keep in (False, True):
        for way in WAYS:
            shard = whole.shard(ContextParallel(grid.cp, head_groups=2, keep_fetched=keep))
            *leaves, d_out = (x[shard.local_index] for x in whole.tensors)
            for x in leaves:
                x.requires_grad_()
            grid.traffic.reset()
            out = way(partial(attend, segments=shard, window=None, backend="cpu"), leaves, d_out)
            gradients = [x.grad for x in leaves if x.grad is not None]
            ours = [out.detach(), *gradients]
            received = grid.traffic.bytes["cp global"] / (2 * leaves[1][0].numel() * 8)
            plan = shard.by_window(None)[0].plan
            found.append(
                (
                    way.__name__,
                    keep,
                    error(ours, right[: len(ours)], shard.local_index),
                    received,
                    (plan.received, len(plan.send)),
                )
            )
    return found


def test_keys_fetched_again_or_kept_under_every_use_of_autograd(run_distributed) -> None:
    # How often keys come and gradients go, for fetched keys not kept and kept. Where attention is recomputed in any case,
    # the caller keeps them.
    times = {
        ("plain", False): (2, 1),
        ("plain", True): (1, 1),
        ("without_gradients", False): (1, 0),
        ("without_gradients", True): (1, 0),
        ("backward_twice", False): (3, 2),
        ("backward_twice", True): (1, 2),
        ("recomputed", True): (2, 1),
        ("recomputed_reentrant", True): (2, 1),
        ("recomputed_reentrant", False): (3, 1),
    }
    for found in run_distributed(under_autograd, 2, cp=2):
        for way, keep, worst, received, (come, go) in found:
            assert worst <= EXACT, (way, keep)
            fetches, returns = times.get((way, keep), (None, None))
            if fetches is not None:
                assert received == fetches * come + returns * go, (way, keep)


def refused(grid: Grid) -> str:
    whole = Whole.make([0, 16], 1, 16, heads=(4, 2))
    with pytest.raises(ValueError) as caught:
        whole.part(whole.shard(ContextParallel(grid.cp, head_groups=4)), None)
    whole.part(whole.shard(ContextParallel(grid.cp, head_groups=4)), 3)  # local layers travel whole
    return str(caught.value)


def test_head_groups_that_do_not_divide_the_heads_are_refused(run_distributed) -> None:
    for message in run_distributed(refused, 2, cp=2):
        assert message == "2 KV heads of a rank cannot be divided into parallel.cp_head_groups = 4"


@pytest.mark.parametrize("order", ORDERS)
def test_one_rank_needs_no_group(order) -> None:
    whole = Whole.make([0, 5, 16, 24, 32], 2, 16)
    shard = whole.shard(ContextParallel(Group.alone("cp"), order, head_groups=2))
    for window in (3, None):
        assert error(whole.part(shard, window), whole.reference(window), shard.local_index) <= EXACT
        segments = Segments.from_cu_seqlens(whole.cu)
        q, k, v, _ = whole.tensors
        out = attend(q, k, v, segments, window=window, backend="cpu")
        assert error([out], whole.reference(window)[:1], shard.local_index) <= EXACT


def test_indexes_are_made_once_a_window() -> None:
    shard = ContextShard([0, 5, 16], 1, 16, ContextParallel(Group.alone("cp")), "cpu")
    assert shard.by_window(3) is shard.by_window(3)
    assert shard.by_window(None) is not shard.by_window(3)
    assert (traffic_label(3), traffic_label(None)) == ("cp local", "cp global")


def test_bad_settings_are_refused() -> None:
    group = Group.alone("cp")
    with pytest.raises(ValueError, match="order 'ring'"):
        ContextParallel(group, "ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head_groups must be at least 1, not 0"):
        ContextParallel(group, head_groups=0)
    with pytest.raises(TypeError, match="window must be an int"):
        ContextShard([0, 8], 1, 8, ContextParallel(group), "cpu").by_window((3, 0))  # type: ignore[arg-type]
