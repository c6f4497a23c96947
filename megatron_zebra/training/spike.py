"""What loss is usual, and what is a spike. Pure."""

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Annotated

from pydantic import Field

from megatron_zebra.config.fields import READ_BACK


@dataclass(frozen=True)
class Usual:
    """Running mean and variance of the loss of a step: of all steps at first, then with weights that fall over ``window`` steps."""

    __pydantic_config__ = READ_BACK

    mean: float = 0.0
    variance: float = 0.0
    steps: Annotated[int, Field(ge=0)] = 0

    def after(self, loss: float, window: int) -> "Usual":
        """With one more step's loss; one that is not finite changes nothing."""
        if not isfinite(loss):
            return self
        share = max(1 / window, 1 / (self.steps + 1))
        away = loss - self.mean
        return Usual(self.mean + share * away, (1 - share) * (self.variance + share * away * away), self.steps + 1)

    def deviations(self, loss: float, window: int) -> float:
        """How many standard deviations ``loss`` is above the mean; 0 until ``window`` steps are known."""
        if self.steps < window or not isfinite(loss) or loss <= self.mean:
            return 0.0
        return (loss - self.mean) / sqrt(self.variance) if self.variance > 0 else inf
