"""A save beside the training: the state is copied to host memory, and a thread of its own writes the copies."""

import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, Generic, TypeVar

from megatron_zebra.checkpoint.pieces import PieceKey
from megatron_zebra.parallel.whereabouts import SAVE_THREAD

T = TypeVar("T")


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


class HostCopies:
    """Copies of pieces, in memory that is kept from one save to the next: new memory costs more time than the copying."""

    def __init__(self) -> None:
        self._kept: dict[PieceKey, Any] = {}
        self._under_way: Background[None] = Background()

    def set_aside(self, pieces: Iterable[tuple[PieceKey, Any]]) -> None:
        """Begin to take the memory for copies of these pieces, on a thread: so the first save need not wait for it."""

        def take() -> None:
            for key, tensor in pieces:
                self._room(key, tensor).zero_()  # memory is given when it is first written

        self._under_way.start(take)

    def of(self, pieces: Iterable[tuple[PieceKey, Any]]) -> list[tuple[PieceKey, Any]]:
        """Copies of torch tensors on any device; once this returns the tensors may change."""
        import torch

        self._under_way.take(None)
        copies, on_device = [], False
        for key, tensor in pieces:
            copy = self._room(key, tensor)
            copy.copy_(tensor.detach(), non_blocking=True)
            on_device |= tensor.is_cuda
            copies.append((key, copy))
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies

    def _room(self, key: PieceKey, tensor: Any) -> Any:
        import torch

        kept = self._kept.get(key)
        if kept is None or kept.dtype != tensor.dtype:
            kept = self._kept[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept
