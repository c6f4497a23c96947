"""Helpers of the checkpoint tests: ranks as threads, small states, saving and comparing them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zebra.checkpoint import PieceKey, open_checkpoint, save

SHAPES = {"embedding.weight": (13, 6), "layers.0.attention.q_proj.weight": (8, 6), "final_norm.weight": (6,)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class ThreadRank:
    """One rank of a group of threads; a rank left waiting for 20 s fails rather than hangs."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any]):
        self.rank, self.world_size, self._barrier, self._slots = rank, world_size, barrier, slots

    def all_gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        gathered = list(self._slots)
        self._barrier.wait()
        return gathered


def run_ranks(world_size: int, act: Callable[[ThreadRank], Any]) -> list[Any]:
    """Run ``act(rank)`` on every rank at once; results (or the exceptions) in rank order."""
    barrier, slots = threading.Barrier(world_size, timeout=20), [None] * world_size
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = act(ThreadRank(rank, world_size, barrier, slots))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):  # a dead process leaves the group
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def state(step: int) -> dict[tuple[str, str], np.ndarray]:
    """A small state that is a function of the step."""
    rng = np.random.default_rng(step)
    return {(n, k): rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items() for k in KINDS}


def shares(tensors: dict[tuple[str, str], np.ndarray], rank: int, world_size: int) -> list[tuple[PieceKey, np.ndarray]]:
    """What a rank owns when every tensor is cut into flat intervals over the ranks."""
    owned = []
    for (name, kind), value in tensors.items():
        start, stop = value.size * rank // world_size, value.size * (rank + 1) // world_size
        if start < stop:
            zero = (0,) * value.ndim
            key = PieceKey(name, kind, value.shape, zero, value.shape, start, stop - start)
            owned.append((key, value.reshape(-1)[start:stop]))
    return owned


def expected_shapes() -> dict[tuple[str, str], tuple[int, ...]]:
    return {(n, k): s for n, s in SHAPES.items() for k in KINDS}


def save_step(root: Path, step: int, world_size: int = 2, content: int | None = None, **options: Any) -> list[Any]:
    """Save ``state(content or step)``; every rank's Saved or exception."""
    tensors = state(step if content is None else content)

    def act(group: ThreadRank) -> Any:
        owned = shares(tensors, group.rank, world_size)
        meta = {"content": step if content is None else content}
        own = {"rank": group.rank}
        return save(root, step, owned, meta, collective=group, rank_metadata=own, expected=expected_shapes(), **options)

    return run_ranks(world_size, act)


def saved(results: list[Any]) -> Any:
    """The first rank's result, once no rank failed."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0]


def content_of(folder: Path) -> int:
    """The content number of a checkpoint, once every value in it is that content's."""
    checkpoint = open_checkpoint(folder)
    number = checkpoint.metadata["content"]
    for (name, kind), value in state(number).items():
        np.testing.assert_array_equal(checkpoint.read(name, kind), value.reshape(-1))
    return number
