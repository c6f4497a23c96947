"""How fast the ranks exchange: all together, within each node, and each node with its neighbours in a ring."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_zebra.launching.nodes import rounds

REPEATS = 3


@dataclass(frozen=True)
class Figures:
    """Bytes a second. ``inside`` and ``between`` have a figure for each node, or none where there is nothing to measure.

    An all-reduce counts what the busiest link carries, 2 (n - 1) / n of the buffer. ``between``: what all ranks of a node
    receive, on the better of its two links, so that a slow node does not drag down its neighbours' figures.
    """

    size: int
    all_reduce: float | None
    inside: list[float]
    between: list[float]


def measured(device: torch.device, nodes: int) -> Figures:
    """Measure on every rank of the default group; ranks lie node by node, equally many on each."""
    size = (256 if device.type == "cuda" else 4) << 20
    buffer = torch.zeros(size // 4, device=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    local = world // nodes
    node = rank // local
    all_reduce = _all_reduce(buffer, None, world) if world > 1 else None
    inside: list[float] = []
    if local > 1:
        groups = [dist.new_group(list(range(n * local, (n + 1) * local))) for n in range(nodes)]
        own = _all_reduce(buffer, groups[node], local)
        inside = [min(of) for of in _by_node(own, nodes)]
    between: list[float] = []
    if nodes > 1:
        links = [_link(buffer, node, rank, local, pairs) for pairs in rounds(nodes)]
        between = [sum(of) for of in _by_node(max(links), nodes)]
    return Figures(size, all_reduce, inside, between)


def _all_reduce(buffer: torch.Tensor, group: dist.ProcessGroup | None, ranks: int) -> float:
    seconds = _seconds(buffer.device, lambda: dist.all_reduce(buffer, group=group))
    return 2 * (ranks - 1) / ranks * buffer.numel() * 4 / seconds


def _link(buffer: torch.Tensor, node: int, rank: int, local: int, pairs: list[tuple[int, int]]) -> float:
    """Bytes a second that this rank receives from its like on the node beside; 0 where it has none in this round."""
    other = next((a + b - node for a, b in pairs if node in (a, b)), None)
    if other is None:
        _seconds(buffer.device, lambda: None)
        return 0.0
    peer = other * local + rank % local
    received = torch.empty_like(buffer)

    def exchange() -> None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, buffer, peer), dist.P2POp(dist.irecv, received, peer)])
        for work in works:
            work.wait()

    return buffer.numel() * 4 / _seconds(buffer.device, exchange)


def _seconds(device: torch.device, exchange: Callable[[], object]) -> float:
    """Median time of ``exchange`` after a first one that makes connections; all ranks begin each together."""
    taken = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        _synchronize(device)
        began = time.perf_counter()
        exchange()
        _synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_node(own: float, nodes: int) -> list[list[float]]:
    """Every rank's ``own``, node by node."""
    gathered: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    figures = [figure for figure in gathered if figure is not None]
    local = len(figures) // nodes
    return [figures[n * local : (n + 1) * local] for n in range(nodes)]
