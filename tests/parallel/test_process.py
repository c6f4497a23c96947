"""Which rank tells a mistake that all see, and which device a rank takes (the rest is in test_watch.py)."""

import pytest
import torch

from megatron_zebra.errors import UserError, tell
from megatron_zebra.parallel.process import pick_device


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
