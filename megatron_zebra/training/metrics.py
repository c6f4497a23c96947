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
        self._file = path.open("ab")
        self._file.truncate(kept)

    def write(self, record: Record) -> None:
        """Floats as they are; nan and infinities, which JSON lacks, as null."""
        line = json.dumps(_plain(record), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left of a line that a full disk refused; told by write()
            self._file.close()


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
