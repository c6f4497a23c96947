"""Who is who in the world of processes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """This process's place. All work is divided by data parallelism, so the dp group is the world."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    @property
    def is_main(self) -> bool:
        """The one process that prints and logs."""
        return self.rank == 0
