"""Errors that are the user's to mend."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator

LONGEST = 1000  # characters of a line: what it quotes may come from a damaged file
_TELLERS = ("1", "2", "3", "4", "5", "6", "7")  # beside rank 0


class UserError(Exception):
    """A user's mistake, in one line: what, where, what is allowed. ``code`` is the exit code.

    Several mistakes are joined by a line's end and ``error: ``; whatever else no terminal shows is put as ``?``.
    """

    code = 2

    def __init__(self, text: str, mine: bool | None = None) -> None:
        """``mine``: whether this process is the one to tell it; None = rank 0 is, if every rank sees the same."""
        super().__init__("\nerror: ".join(map(_line, text.split("\nerror: "))))
        self.mine = mine


def _line(text: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class RankLost(UserError):
    """Nobody's mistake here: another rank has died or failed, and this one can only end."""

    code = 1


@contextlib.contextmanager
def naming_files() -> Iterator[None]:
    """Turn the system's complaint about a file (a name too long, a folder that may not be entered) into one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{str(error.filename)[:200]}: {error.strerror}") from error


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
    """Run a command line's ``main``; a UserError becomes one line on stderr and its exit code.

    Letters that the output's encoding lacks are shown as ``?``. Where nobody reads the output any more (``| head``), it
    ends as a program that SIGPIPE has ended: with 141.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with naming_files():
            main()
            print(end="", flush=True)  # sys.stdout is None where it was closed before the start
    except BrokenPipeError:
        _leave_stdout()
        sys.exit(141)
    except OSError as error:  # about no file, or it would have been named
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave_stdout()
        tell(full := UserError(f"{error.strerror}: the output needs room where it is written"))
        sys.exit(full.code)
    except UserError as error:
        tell(error)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave_stdout() -> None:
    """What is left to print goes nowhere, without a complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
