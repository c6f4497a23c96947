"""A rank that is lost in the middle of training ends the run, named; fewer processes go on. All kinds: tests/kill_a_rank.py."""

from pathlib import Path

import pytest

from tests.kill_a_rank import CASES, kill_and_go_on


@pytest.mark.parametrize(
    ("case", "torchrun"), [(1, True), (3, False)], ids=["tp by torchrun", "pp by plain environment"]
)
def test_a_lost_rank_is_named_and_fewer_go_on(tmp_path: Path, case: int, torchrun: bool) -> None:
    axes, victim, fewer, after = CASES[case]
    kill_and_go_on(axes, victim, fewer, after, tmp_path, torchrun)
