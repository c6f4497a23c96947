"""Progress of reading: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS = 10.0  # between plain lines


class Progress:
    """Counts bytes of input up to ``total``; ``update`` adds some, with a note to show beside them."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._start = self._shown = time.monotonic()
        self._bar = (
            tqdm(total=total, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def update(self, size: int, note: str) -> None:
        """``size`` more bytes were read."""
        self._done += size
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(size)
        elif time.monotonic() - self._shown >= _SECONDS:
            self._shown = time.monotonic()
            seconds = self._shown - self._start
            left = seconds * (self._total - self._done) / max(self._done, 1)
            print(
                f"{self._what}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB ({self._done / self._total:.0%}), {note}, "
                f"{self._done / 1e6 / seconds:.2f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
