"""What the terminal shows: one bar, or plain lines where there is no terminal."""

import sys
import time
from typing import Any

from tqdm import tqdm

from megatron_zebra.training.metrics import Record


class Console:
    """Progress of one run on stderr; silent on all ranks but the main one."""

    def __init__(self, enabled: bool, steps: int, done: int, interval: int) -> None:
        self.enabled, self.steps, self.interval = enabled, steps, interval
        self.began, self.first = time.monotonic(), done
        self.bar = (
            tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
            if enabled and sys.stderr.isatty()
            else None
        )

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, record: Record) -> None:
        """Show a step's metrics."""
        if self.bar is not None:
            self.bar.set_postfix_str(_summary(record))
            self.bar.update(1)
        elif self.enabled and (record["step"] % self.interval == 0 or record["step"] == self.steps):
            done = record["step"]
            left = (time.monotonic() - self.began) / max(1, done - self.first) * (self.steps - done)
            self.say(f"step {done}/{self.steps}  {_summary(record)}  left {_clock(left)}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _summary(record: dict[str, Any]) -> str:
    parts = [
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['learning_rate']:.2e}",
        f"{_short(record['tokens_per_second'])} tok/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']}")
    return "  ".join(parts)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
