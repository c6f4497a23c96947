"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.distributed import Pool


@pytest.fixture(scope="session")
def run_distributed() -> Iterator[Callable[..., list[Any]]]:
    """``run_distributed(fn, world_size, *args)``: see tests/distributed.py."""
    pool = Pool()
    yield pool.run
    pool.stop()
