"""A rank that is lost in the middle of training ends the run, named; fewer processes go on. All kinds: tests/kill_a_rank.py."""

from pathlib import Path

from tests.kill_a_rank import CASES, kill_and_go_on


def test_a_lost_rank_is_named_and_fewer_go_on(tmp_path: Path) -> None:
    axes, victim, fewer, after = CASES[3]
    kill_and_go_on(axes, victim, fewer, after, tmp_path, torchrun=False)
