"""Joining and leaving the world of processes; the few collectives that training needs of its own."""

import datetime
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_zebra.errors import UserError
from megatron_zebra.launched import launched, meeting_place
from megatron_zebra.parallel.agreement import agree
from megatron_zebra.parallel.grid import Grid, make_grid
from megatron_zebra.parallel.layout import AXES, Layout
from megatron_zebra.parallel.watch import Pace, watched


def pick_device(wanted: str, local_rank: int, named: str = "parallel.device =") -> torch.device:
    """The device of this process for ``wanted``; ``named`` is what an error calls it."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{named} cuda: no CUDA device here (allowed: auto, cpu)")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{named} cuda: {torch.cuda.device_count()} devices here, process {local_rank} of this node has none",
                mine=local_rank == torch.cuda.device_count(),
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def world(
    wanted_device: str,
    timeout: float,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    same: Mapping[str, str] | None = None,
    pace: Pace | None = None,
    named: str = "parallel.device =",
) -> Iterator[Grid]:
    """Join the process group that torchrun's environment describes (alone without one), and leave it at the end.

    Within, a rank that dies or fails ends the others, each with a line that says who and in which collective it waited:
    see ``parallel/watch.py``. A UserError that leaves it is told by one rank.

    Args:
        wanted_device: auto, cpu or cuda; ``named`` is what an error calls it.
        timeout: seconds that a collective may wait, and that the ranks wait for each other at the start.
        tp, cp, pp: ``parallel.tp`` and so on; data parallelism takes what is left.
        same: facts that must be the same on all ranks.
        pace: how closely the ranks watch each other.

    Raises:
        UserError: the others cannot be reached, or were started with other facts.
        RankLost: another rank died or failed.
    """
    started = launched()
    rank, size, local_rank = started.rank, started.world_size, started.local_rank
    layout = Layout.of(size, tp=tp, cp=cp, pp=pp)
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, keeper = (dist.HashStore(), 0) if started.alone else meeting_store(rank, size, limit)
    except (RuntimeError, ValueError) as problem:
        raise _unreached(problem, local_rank) from None
    with watched(store, rank, size, lambda other: rank_name(layout, other), keeper, pace or Pace(), leave) as watch:
        # Before any collective: other numbers of ranks in a group, for one, would let all hang.
        if size > 1:
            agree(store, rank, size, same or {}, timeout)
        device = pick_device(wanted_device, local_rank, named)
        _quiet_deepspeed(device)
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(
            _backend(device), store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=limit
        )
        deepspeed.init_distributed(_backend(device), auto_mpi_discovery=False, verbose=False, timeout=limit)
        grid = make_grid(layout, rank, local_rank, device)
        watch.where, watch.progress = lambda: grid.traffic.current, lambda: grid.traffic.operations
        yield grid


def meeting_store(rank: int, size: int, limit: datetime.timedelta) -> tuple[dist.Store, int | None]:
    """Where the ranks meet, and the rank whose process keeps it (None: torchrun's). Does not wait for the others."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", timeout=limit))[0], None
    address, port = meeting_place()
    store = dist.TCPStore(address, port, size, rank == 0, limit, wait_for_workers=False, multi_tenant=True)
    return store, 0


def rank_name(layout: Layout, rank: int) -> str:
    """A rank in words, with its place on every axis."""
    place = layout.coordinates(rank)
    return f"rank {rank} ({', '.join(f'{axis} {i}' for axis, i in zip(AXES, place))})"


def _unreached(problem: Exception, local_rank: int) -> UserError:
    return UserError(f"joining the other processes at {_address()}: {_short(problem)}", local_rank == 0)


def _address() -> str:
    return f"MASTER_ADDR:MASTER_PORT = {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _short(problem: Exception) -> str:
    """torch's errors go over many lines, with a stack of C++ frames."""
    text = " ".join(str(problem).splitlines()[:1])
    if "EADDRINUSE" in str(problem) or "address already in use" in str(problem):
        return "the port is in use; give another MASTER_PORT (torchrun: --master-port, or --standalone)"
    return text


def leave() -> None:
    """Destroy the process group, and DeepSpeed's memory of it, so that another may be made."""
    if dist.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def sum_over(values: list[float], device: torch.device) -> list[float]:
    """Sum of each value over all ranks, in fp64 where the device has it."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class WorldCollective:
    """All ranks of ``grid``, as the checkpoint store asks for them.

    Args:
        aside: in a group of its own, over gloo, that another thread may use while this one trains; made by all ranks together.
    """

    def __init__(self, grid: Grid, aside: bool = False) -> None:
        self.rank, self.world_size = grid.rank, grid.world_size
        # Who carries files away waits for the slowest; a rank that is lost is told by the watch, not by this limit.
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7)) if aside else None

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, self._group)
        return gathered


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _quiet_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device, without the extension it would compile on CPU and without its notes."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # prints lines that nobody asked for
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at first use (minutes); gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
