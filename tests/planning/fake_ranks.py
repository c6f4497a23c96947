"""What single ranks of large worlds hold: models and optimizers are built for real, in a process group that only pretends.

python -m tests.planning.fake_ranks < layouts.json     (prints a list: of each rank its bytes of weights and optimizer)
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_zebra.parallel.grid import make_grid
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.parallel.process import _quiet_deepspeed, leave
from megatron_zebra.training.build import build_training
from tests.training.cases import opened, small


def held(rank: int, world: int, axes: dict[str, int], settings: dict[str, Any]) -> dict[str, int]:
    """Bytes of rank ``rank``: weights as trained with (under ZeRO-3 its share), fp32 masters and moments."""
    import deepspeed

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    try:
        config = small(**settings)
        arch, _ = opened(config)
        optimizer: Any = build_training(
            config, arch, make_grid(Layout.of(world, **axes), rank, 0, torch.device("cpu"))
        ).optimizer
        params = [getattr(param, "ds_tensor", param) for param in optimizer.module.parameters()]
        weights = {t.data_ptr(): t.numel() * t.element_size() for t in params}
        moments = [value for state in optimizer.adam.state.values() for name, value in state.items() if name != "step"]
        masters = list(optimizer.masters.values()) if hasattr(optimizer, "masters") else optimizer._masters()
        own = {t.data_ptr(): t.numel() * t.element_size() for t in [*moments, *masters] if t.data_ptr() not in weights}
        return {"weights": sum(weights.values()), "optimizer": sum(own.values())}
    finally:
        leave()


def main() -> None:
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    _quiet_deepspeed(torch.device("cpu"))
    print("\n" + json.dumps([held(**case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
