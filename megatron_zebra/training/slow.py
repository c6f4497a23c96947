"""Ranks that hold the others up: seconds of their own work, beside those of all. Pure."""

from collections.abc import Callable, Sequence
from statistics import median

FACTOR = 1.5
NAMED = 4


class SlowRanks:
    """Adds up each rank's own seconds of the steps between two reports."""

    def __init__(self, name: Callable[[int], str]) -> None:
        self.name, self.sums, self.steps = name, [0.0], 0

    def add(self, own_times: Sequence[float]) -> None:
        """One step's, by rank."""
        sums = self.sums if self.steps else [0.0] * len(own_times)
        self.sums, self.steps = [a + b for a, b in zip(sums, own_times, strict=True)], self.steps + 1

    def report(self) -> str | None:
        """A line on ranks that took more than FACTOR times the median since the last report; None if there are none."""
        steps, sums = max(1, self.steps), self.sums
        self.sums, self.steps = [0.0], 0
        usual = median(sums)
        slow = sorted((rank for rank, own in enumerate(sums) if own > FACTOR * usual), key=lambda rank: -sums[rank])
        if not slow:
            return None
        named = ", ".join(f"{self.name(rank)}: {sums[rank] / steps:.3g} s" for rank in slow[:NAMED])
        more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
        return f"slow: {named}{more}; own work in a step, {usual / steps:.3g} s in the middle of all ranks"
