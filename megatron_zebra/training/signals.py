"""The signals that end a run."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals(alone: bool) -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come, or Ctrl-C to a process that is ``alone`` (else the launcher hands it on).

    A first Ctrl-C says what it does, a second one ends all at once. The former handlers are put back; what a shell has
    a job ignore stays ignored.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")

    alone = alone and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGTERM,)
    former = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
