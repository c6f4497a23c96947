"""A save beside the training: the state is copied to host memory, and a thread of its own writes the copies."""

import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, Generic, TypeVar

from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.parallel.whereabouts import SAVE_THREAD

T = TypeVar("T")


class HostCopies:
    """Copies of pieces, in memory that is kept from one save to the next: new memory costs more time than the copying."""

    def __init__(self) -> None:
        self._kept: dict[PieceKey, Any] = {}

    def of(self, pieces: Iterable[tuple[PieceKey, Any]]) -> list[tuple[PieceKey, Any]]:
        """Copies of torch tensors on any device; once this returns the tensors may change."""
        import torch

        copies, on_device = [], False
        for key, tensor in pieces:
            copy = self._kept.get(key)
            if copy is None or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept[key] = copy
            copy.copy_(tensor.detach(), non_blocking=True)
            on_device |= tensor.is_cuda
            copies.append((key, copy))
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies


class Background(Generic[T]):
    """One act at a time on a thread that ends with the process; what it raises is raised where its outcome is taken."""

    def __init__(self) -> None:
        self._outcome: futures.Future[T] | None = None

    def start(self, act: Callable[[], T]) -> None:
        """Begin ``act``; the outcome of the one before must have been taken."""
        if self.busy:
            raise RuntimeError("the act before has an outcome that nobody took")
        outcome: futures.Future[T] = futures.Future()
        self._outcome = outcome

        def run() -> None:
            try:
                outcome.set_result(act())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name=SAVE_THREAD, daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether there is an act whose outcome nobody took."""
        return self._outcome is not None

    def take(self, wait: float | None = 0) -> T | None:
        """The outcome, once; None if there is none after ``wait`` seconds (None: however long it takes)."""
        outcome = self._outcome
        if outcome is None or not futures.wait([outcome], wait).done:
            return None
        self._outcome = None
        return outcome.result()
