"""Errors that are the user's to mend."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake, in one line: what, where, what is allowed."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line's ``main``; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
