"""The check of the nodes, before training: the same software and GPUs, one run folder, and how fast they exchange.

What could hang or crash over unequal versions comes last: first the nodes leave what they are in the launcher's store, where
rank 0 reads it; only then do they make a process group.
"""

import contextlib
import datetime
import json
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zebra.errors import RankLost, UserError
from megatron_zebra.launched import Launched
from megatron_zebra.launching.bandwidth import Figures, measured
from megatron_zebra.launching.nodes import Node, named, problems, settled, slow, this_node
from megatron_zebra.parallel.process import pick_device

FILE = ".seen-by-all-nodes"
PATIENCE = 15.0  # seconds for a file of one node to show on another: network file systems cache for a few


def check_nodes(store: dist.Store, started: Launched, wanted_device: str, folder: Path, timeout: float) -> None:
    """Return on every rank once the nodes are known to be fit; rank 0 prints what was measured.

    Args:
        store: where the ranks meet.
        wanted_device: ``parallel.device``.
        folder: the run's.
        timeout: seconds that ranks wait for each other.

    Raises:
        UserError: on every rank, told by rank 0; the nodes differ, lack GPUs or do not share ``folder``.
        RankLost: the others cannot be reached.
    """
    limit = datetime.timedelta(seconds=timeout)
    store = dist.PrefixStore("nodes", store)
    try:
        nodes = _agreed(store, started, wanted_device, folder, limit)
        device = pick_device(wanted_device, started.local_rank)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=started.rank,
            world_size=started.world_size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        try:
            figures = measured(device, len(nodes))
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:  # torch's errors of stores and collectives are all of this kind
        first = next(iter(str(error).splitlines()), "")
        text = f"rank {started.rank} cannot reach the others, in the check of the nodes: {first}"
        raise RankLost(text, mine=started.local_rank == 0) from None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if started.rank == 0:
        print("\n".join(_told(nodes, figures)), flush=True)


def _agreed(store: dist.Store, started: Launched, device: str, folder: Path, limit: datetime.timedelta) -> list[Node]:
    """Every node, in order of rank, on every rank."""
    store.set_timeout(limit)
    if started.rank == 0:
        store.set("token", _write(folder))
    own = None
    if started.local_rank == 0:
        own = this_node(_gpus(), _libraries(), _sees(folder, store.get("token").decode()))
    store.set(f"node/{started.rank}", json.dumps(own and asdict(own)))
    if started.rank == 0:
        store.set("found", json.dumps(_compared(store, started.world_size, device, folder)))
    found = json.loads(store.get("found"))
    if found["problems"]:
        store.add("read", 1)
        until = time.monotonic() + PATIENCE
        # Rank 0 may keep the store, which goes with it.
        while started.rank == 0 and store.add("read", 0) < started.world_size and time.monotonic() < until:
            time.sleep(0.02)
        raise UserError("\nerror: ".join(found["problems"]), mine=started.rank == 0)
    return [Node(**node) for node in found["nodes"]]


def _compared(store: dist.Store, size: int, device: str, folder: Path) -> dict[str, list[Any]]:
    keys = [f"node/{rank}" for rank in range(size)]
    store.wait(keys)
    nodes = settled([node and Node(**node) for node in map(json.loads, store.multi_get(keys))])
    (folder / FILE).unlink(missing_ok=True)
    needs_gpus = device == "cuda" or (device == "auto" and any(node.gpus for node in nodes))
    return {"problems": problems(nodes, folder, needs_gpus), "nodes": [asdict(node) for node in nodes]}


def _told(nodes: Sequence[Node], figures: Figures) -> list[str]:
    """What rank 0 prints."""
    hosts = [node.host for node in nodes]
    node = nodes[0]
    kind = f", GPUs: {node.facts['GPUs']}" if node.gpus else ""
    lines = [
        f"nodes: {named(hosts)}; {node.processes} process{'es' * (node.processes > 1)} each{kind}; equal versions, one run folder (torch {node.facts['torch']}, NCCL {node.facts['NCCL']})"
    ]
    if figures.all_reduce is not None:
        parts = [f"{figures.all_reduce / 1e9:.2f} GB/s over all {len(nodes) * node.processes} ranks"]
        parts += [f"{_range(figures.inside)} within a node"] if figures.inside else []
        parts += [f"{_range(figures.between)} received by a node from the next"] if figures.between else []
        lines.append(f"nodes: all-reduce of {figures.size >> 20} MiB: {', '.join(parts)}")
    for what, by_node in (("within it", figures.inside), ("with its neighbours", figures.between)):
        of = dict(zip(hosts, by_node))
        for host in slow(of):
            lines.append(
                f"warning: {host} is slow {what}: {of[host] / 1e9:.2f} GB/s, the median is {statistics.median(by_node) / 1e9:.2f}"
            )
    return lines


def _range(figures: Sequence[float]) -> str:
    least, most = f"{min(figures) / 1e9:.2f}", f"{max(figures) / 1e9:.2f}"
    return f"{least} GB/s" if least == most else f"{least} to {most} GB/s"


def _write(folder: Path) -> str:
    """Leave a file for the other nodes to see; what is in it."""
    token = secrets.token_hex(8)
    with contextlib.suppress(OSError):  # then nobody sees it, and that is told
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(token)
    return token


def _sees(folder: Path, token: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if (folder / FILE).read_text() == token:
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _libraries() -> dict[str, str]:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return {"torch's CUDA": torch.version.cuda or "none", "NCCL": nccl}
