"""metrics.jsonl, a line a step, and evaluation.jsonl, a line an evaluation: cut back to the restored step when a run resumes."""

import contextlib
import json
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_zebra.plain import plain

Record = dict[str, Any]


class Appended:
    """A file whose end is written without a buffer; what the disk does not take now goes before what follows."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._waiting = file, b""

    def write(self, data: bytes) -> None:
        """OSError if not all could be written; the next call tries again, from the byte where this one stopped."""
        self._waiting += data
        self._write()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told by write()
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


class MetricsFile:
    """Appends records; each is on its way to the disk before the next step begins."""

    def __init__(self, path: Path, restored_step: int) -> None:
        """Keep what is up to the last whole line of a step up to ``restored_step``, and drop what follows."""
        kept = place = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    place += len(line)
                    step = _step(line)
                    if step is not None and step > restored_step:
                        break
                    if step is not None:  # a line that nobody can read costs none of those after it
                        kept = place
        end = path.open("ab", buffering=0)
        end.truncate(kept)
        self._records = Appended(end)

    def write(self, record: Record) -> None:
        """Floats as they are.

        Raises:
            OSError: it could not be written; the next call tries again.
        """
        self._records.write(json.dumps(plain(record), allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._records.close()


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
