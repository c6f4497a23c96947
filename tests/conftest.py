"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as pretrain_zebra.py does: no C++ frames where a rank ends

import pytest

from tests.distributed import Pool


@pytest.fixture(scope="session")
def run_distributed() -> Iterator[Callable[..., list[Any]]]:
    """``run_distributed(fn, world_size, *args)``: see tests/distributed.py."""
    pool = Pool()
    yield pool.run
    pool.stop()
