"""Errors that are the user's to mend."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake, in one line: what, where, what is allowed. ``code`` is the exit code."""

    code = 2

    def __init__(self, text: str, mine: bool | None = None) -> None:
        """``mine``: whether this process is the one to tell it; None = rank 0 is, since every rank sees the same."""
        super().__init__(text)
        self.mine = mine


class RankLost(UserError):
    """Nobody's mistake here: another rank has died or failed, and this one can only end."""

    code = 1


def tell(error: UserError) -> None:
    """Print ``error`` on stderr, if this process is the one to do so."""
    if os.environ.get("RANK", "0") == "0" if error.mine is None else error.mine:
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
