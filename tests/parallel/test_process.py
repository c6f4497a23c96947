"""One line for one mistake, whichever rank met it."""

import pytest
import torch
import torch.distributed as dist

from megatron_zebra.errors import UserError, tell
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import leave, pick_device, told_by_one


def meets(grid: Grid, ranks: list[int]) -> tuple[str, bool | None]:
    """The error of this rank, and whether it is the one to tell it, where ``ranks`` meet one and the others wait for them."""
    try:
        with told_by_one():
            if grid.rank in ranks:
                raise UserError(f"rank {grid.rank}: bad row")
            dist.all_reduce(torch.zeros(1))
    except UserError as error:
        leave()
        return str(error), error.mine
    return "", None


@pytest.mark.parametrize(("ranks", "teller"), [([1], 1), ([0], 0)])
def test_one_rank_tells_what_it_alone_met(run_distributed, ranks: list[int], teller: int) -> None:
    seen = run_distributed(meets, 2, ranks)
    assert seen[teller] == (f"rank {teller}: bad row", True)
    assert seen[1 - teller] == ("another rank has told why the run ends", False)


def test_one_rank_tells_what_all_met(run_distributed) -> None:
    seen = run_distributed(meets, 2, [0, 1])
    assert sorted(mine for _, mine in seen) == [False, True]


def broken(grid: Grid) -> str:
    try:
        with told_by_one():
            raise RuntimeError("a fault of ours")
    except RuntimeError as error:
        return str(error)


def test_a_fault_of_ours_is_not_hidden(run_distributed) -> None:
    assert run_distributed(broken, 2) == ["a fault of ours"] * 2


def test_who_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, mine, told in [("0", None, True), ("1", None, False), ("1", True, True), ("0", False, False)]:
        monkeypatch.setenv("RANK", rank)
        tell(UserError("wrong", mine))
        assert capsys.readouterr().err == ("error: wrong\n" if told else "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_device() -> None:
    assert pick_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"parallel.device = cuda: no CUDA device here"):
        pick_device("cuda", 0)
