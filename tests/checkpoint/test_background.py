"""Copies that a save writes while training goes on."""

from typing import Any

import pytest
import torch

from megatron_zebra.checkpoint.background import HostCopies
from megatron_zebra.checkpoint.pieces import PieceKey


def piece(values: list[float]) -> tuple[PieceKey, Any]:
    return PieceKey("a", "weight", (len(values),), (0,), (len(values),), 0, len(values)), torch.tensor(values)


def test_a_copy_takes_the_memory_that_was_set_aside_and_every_later_copy_too() -> None:
    copies, made = HostCopies(), piece([1.0, 2.0])
    copies.set_aside([made])
    ((_, first),) = copies.of([made])
    made[1].add_(1)
    assert first.tolist() == [1.0, 2.0]
    ((_, second),) = copies.of([made])
    assert second.data_ptr() == first.data_ptr() == copies._kept[made[0]].data_ptr()
    assert second.tolist() == [2.0, 3.0]


def test_all_of_it_is_taken_before_the_first_copy() -> None:
    copies, made = HostCopies(), piece([1.0])
    copies.set_aside([made])
    copies._under_way.take(None)
    assert copies._kept[made[0]].tolist() == [0.0]


def test_what_went_wrong_on_the_thread_is_raised_by_the_save() -> None:
    def broken() -> Any:
        raise MemoryError("no room")
        yield

    copies = HostCopies()
    copies.set_aside(broken())
    with pytest.raises(MemoryError, match="no room"):
        copies.of([piece([1.0])])
