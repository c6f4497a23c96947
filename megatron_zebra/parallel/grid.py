"""This process's place among all, and the groups it belongs to. Made once, handed around explicitly."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_zebra.parallel.group import Group, Traffic
from megatron_zebra.parallel.layout import Layout


@dataclass(frozen=True)
class Grid:
    """Groups by what their members divide: ``tp``, ``cp``, ``pp`` a layer, a sequence, the stack of layers.

    ``data`` holds the ranks whose gradients of the same parameters are averaged (dp x cp: ZeRO divides its state over
    them), ``model`` those that hold one copy of the model between them (pp x tp), ``replica`` those that read the same rows
    (pp x cp x tp), ``ends`` the first and the last stage of this rank's pipeline (alone if this rank is neither).
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
    def is_main(self) -> bool:
        """The one process that prints and logs."""
        return self.rank == 0


def make_grid(layout: Layout, rank: int, local_rank: int, device: torch.device) -> Grid:
    """Create the groups; called by all ranks together, after the world was joined."""
    traffic = Traffic()

    def mine(name: str, groups: list[list[int]]) -> Group:
        found = Group(name, (rank,), 0, None, traffic)
        for ranks in groups:
            if len(ranks) == 1:
                continue
            # All ranks take part in making every group, in the same order.
            handle = dist.group.WORLD if len(ranks) == layout.world_size else dist.new_group(ranks)
            if rank in ranks:
                found = Group(name, tuple(ranks), ranks.index(rank), handle, traffic)
        return found

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
