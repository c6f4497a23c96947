"""Which rank tells a mistake that all see, what a launcher must say, and which device a rank takes (the rest is in test_watch.py)."""

import pytest
import torch

from megatron_zebra.errors import UserError, tell
from megatron_zebra.launched import launched, meeting_place
from megatron_zebra.parallel.process import pick_device


def test_who_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank, mine, told in [("0", None, True), ("1", None, False), ("1", True, True), ("0", False, False)]:
        monkeypatch.setenv("RANK", rank)
        tell(UserError("wrong", mine))
        assert capsys.readouterr().err == ("error: wrong\n" if told else "")


def test_ranks_that_were_started_one_by_one_tell_what_may_be_theirs_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for rank, told in [("0", "error: wrong\n"), ("7", "error: rank 7: wrong\n"), ("8", "")]:
        monkeypatch.setenv("RANK", rank)
        tell(UserError("wrong"))
        assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set: must be a whole number from 1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4: needs RANK beside it"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE = two: must be a whole number from 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2: must be a whole number 0 to 1 with WORLD_SIZE = 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = -1: must be a whole number 0 to 1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "9"}, "LOCAL_RANK = 9: must be a whole number 0 to 1"),
    ],
)
def test_a_wrong_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], line: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        launched()
    assert str(told.value).startswith(line)
    assert told.value.mine is True


@pytest.mark.parametrize(
    ("address", "port", "line"),
    [("", "1", "MASTER_ADDR: must be"), ("a", "", "MASTER_PORT = :"), ("a", "70000", "MASTER_PORT = 70000:")],
)
def test_a_wrong_meeting_place_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str, port: str, line: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError) as told:
        meeting_place()
    assert str(told.value).startswith(line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_device() -> None:
    assert pick_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"parallel.device = cuda: no CUDA device here"):
        pick_device("cuda", 0)
