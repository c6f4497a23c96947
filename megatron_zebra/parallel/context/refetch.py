"""Fetched keys that are not kept for backward: autograd keeps how to fetch them, and fetches when it needs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_zebra.parallel.context.exchange import Fetch


class View(NamedTuple):
    """A tensor within the fetched keys."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Refetch:
    """Stands for one kernel call's fetched keys in what autograd saves.

    Backward visits the calls in the opposite order: when it takes the keys of one, those of the call ``before`` it are
    sent for. A rank does so exactly when the others do, since all save the same tensors.
    """

    def __init__(self, fetch: Callable[[], Fetch], before: "Refetch | None") -> None:
        self._fetch, self._before = fetch, before
        self._coming: Fetch | None = None
        self._keys: torch.Tensor | None = None
        self._saved = self._taken = 0

    def hooks(self, keys: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Within these hooks, what is saved of the storage of ``keys`` is fetched again; the rest is kept as usual."""
        storage = keys.untyped_storage().data_ptr()

        def pack(x: torch.Tensor) -> Any:
            if x.untyped_storage().data_ptr() != storage:
                return x
            self._saved += 1
            return View(x.size(), x.stride(), int(x.storage_offset()))

        def unpack(saved: Any) -> torch.Tensor:
            return self._take().as_strided(*saved) if isinstance(saved, View) else saved

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def begin(self) -> None:
        """Send for the keys, unless they are here or under way."""
        if self._coming is None and self._keys is None:
            self._coming = self._fetch()

    def _take(self) -> torch.Tensor:
        """The keys, for one of the saved tensors; after the last of them they are let go."""
        if self._keys is None:
            self.begin()
            assert self._coming is not None
            self._keys, self._coming = self._coming.finish(), None
            if self._before is not None:
                self._before.begin()
        keys = self._keys
        self._taken += 1
        if self._taken == self._saved:
            self._keys, self._taken = None, 0
        return keys
