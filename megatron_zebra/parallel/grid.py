"""This process's place among all, and the groups it belongs to. Made once, handed around explicitly."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_zebra.parallel.group import Group, Traffic
from megatron_zebra.parallel.layout import Layout


@dataclass(frozen=True)
class Grid:
    """Groups by what their members divide: ``tp``, ``cp``, ``pp`` a layer, a sequence, the stack of layers.

    ``data`` holds the ranks whose gradients of the same parameters are averaged (dp x cp: ZeRO divides its state over
    them), ``model`` those that hold one copy of the model between them (pp x tp), ``ends`` the first and the last rank of
    this rank's pipeline (alone if this rank is neither).
    """

    layout: Layout
    rank: int
    local_rank: int
    device: torch.device
    world: Group
    tp: Group
    cp: Group
    pp: Group
    data: Group
    model: Group
    ends: Group
    traffic: Traffic

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def dp_rank(self) -> int:
        return self.layout.coordinates(self.rank).dp

    @property
    def dp_size(self) -> int:
        return self.layout.dp

    @property
    def is_first_of_replica(self) -> bool:
        """The one rank that speaks for all that read the same rows."""
        place = self.layout.coordinates(self.rank)
        return place.pp == place.cp == place.tp == 0

    @property
    def is_main(self) -> bool:
        """The one process that prints and logs."""
        return self.rank == 0


def make_grid(layout: Layout, rank: int, local_rank: int, device: torch.device) -> Grid:
    """Create the groups; called by all ranks together, after the world was joined."""
    traffic = Traffic()
    handles: dict[tuple[int, ...], Any] = {tuple(range(layout.world_size)): dist.group.WORLD}

    def mine(name: str, groups: list[list[int]]) -> Group:
        own = next((tuple(ranks) for ranks in groups if rank in ranks), (rank,))
        for ranks in map(tuple, groups):
            # All ranks take part in making every group, in the same order; of a group of one, that one alone.
            if ranks not in handles and (len(ranks) > 1 or ranks == own):
                handles[ranks] = dist.new_group(list(ranks), use_local_synchronization=len(ranks) == 1)
        return Group(name, own, own.index(rank), handles.get(own), traffic)

    return Grid(
        layout,
        rank,
        local_rank,
        device,
        world=mine("world", [list(range(layout.world_size))]),
        tp=mine("tp", layout.groups("tp")),
        cp=mine("cp", layout.groups("cp")),
        pp=mine("pp", layout.groups("pp")),
        data=mine("data", layout.groups("dp", "cp")),
        model=mine("model", layout.groups("pp", "tp")),
        ends=mine("ends", [[ranks[0], ranks[-1]] for ranks in layout.groups("pp") if len(ranks) > 1]),
        traffic=traffic,
    )
