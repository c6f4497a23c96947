"""The one thing the store asks of a process group, so that it runs under gloo, NCCL, or none."""

from typing import Any, Protocol

from megatron_zebra.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    DiskFull,
    IncompleteCheckpoint,
    NotTaken,
    OtherFormat,
)


class Collective(Protocol):
    """A group of processes that all make the same calls in the same order.

    ``all_gather`` takes a picklable value from every rank and returns all of them, in rank order, to every rank. It is also
    the barrier: nobody returns before everybody called. ``torch.distributed.all_gather_object`` does it.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]: ...


class Alone:
    """The group of one process."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


def agree(collective: Collective, error: Exception | None) -> None:
    """Raise on every rank if any rank met an error: its own on the rank that met it, the first one's elsewhere.

    Without this the others would wait for ever in the next collective. One of our errors keeps its type.
    """
    outcomes = collective.all_gather(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            name, text = outcome
            ours = _OURS.get(name)
            raise ours(f"rank {rank}: {text}") if ours else CheckpointError(f"rank {rank}: {name}: {text}")


_OURS = {
    kind.__name__: kind
    for kind in (CheckpointError, DamagedCheckpoint, OtherFormat, IncompleteCheckpoint, NotTaken, DiskFull)
}
