"""metrics.jsonl, a line a step, and evaluation.jsonl, a line an evaluation: cut back to the restored step when a run resumes."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class MetricsFile:
    """Appends records; each is on its way to the disk before the next step begins."""

    def __init__(self, path: Path, restored_step: int) -> None:
        """Keep the whole lines of steps up to ``restored_step`` and drop what follows (also a line cut by a crash)."""
        kept = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    step = _step(line)
                    if step is None or step > restored_step:
                        break
                    kept += len(line)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(kept)
        self._waiting = b""  # lines, or the rest of one, for which there was no room

    def write(self, record: Record) -> None:
        """Floats as they are; nan and infinities, which JSON lacks, as null.

        Raises:
            OSError: it could not be written; the next call tries again.
        """
        self._waiting += json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        self._write()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told by write()
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
