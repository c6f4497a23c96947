"""Errors that are the user's to mend."""

import os
import sys
from collections.abc import Callable

_TELLERS = ("1", "2", "3", "4", "5", "6", "7")  # beside rank 0


class UserError(Exception):
    """A user's mistake, in one line: what, where, what is allowed. ``code`` is the exit code."""

    code = 2

    def __init__(self, text: str, mine: bool | None = None) -> None:
        """``mine``: whether this process is the one to tell it; None = rank 0 is, if every rank sees the same."""
        super().__init__(text)
        self.mine = mine


class RankLost(UserError):
    """Nobody's mistake here: another rank has died or failed, and this one can only end."""

    code = 1


def tell(error: UserError) -> None:
    """Print ``error`` on stderr, if this process is the one to do so.

    torchrun starts all ranks alike, so what rank 0 sees all see. Where each was started by itself, what is wrong with one
    is perhaps wrong with that one alone: the first few tell it, with their rank.
    """
    rank = os.environ.get("RANK", "0")
    alike = "TORCHELASTIC_RUN_ID" in os.environ
    if error.mine is None and not alike and rank in _TELLERS:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == "0" if error.mine is None else error.mine:
        print(f"error: {error}", file=sys.stderr, flush=True)


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line's ``main``; a UserError becomes one line on stderr and its exit code."""
    try:
        main()
    except UserError as error:
        tell(error)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
