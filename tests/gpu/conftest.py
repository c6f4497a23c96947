"""One GPU for the tests of this folder; without one they are skipped."""

from collections.abc import Iterator

import pytest
import torch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import world


@pytest.fixture(scope="package")
def gpu() -> Iterator[Grid]:
    """The grid of one process on this machine's first GPU, over NCCL."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with world("cuda", 60.0) as grid:
        yield grid
