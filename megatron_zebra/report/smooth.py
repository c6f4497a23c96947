"""The running mean of a noisy curve."""

import numpy as np

from megatron_zebra.report.run import Series


def smooth(values: Series, share: float = 0.03) -> Series:
    """Mean over the ``share`` of the run around each step, less at its ends; what is nan adds nothing."""
    there = np.isfinite(values)
    reach = max(1, int(share * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    at = np.arange(len(values))
    # As far to the left as to the right, so that a falling curve is not pulled to one side.
    around = np.minimum(reach, np.minimum(at, len(values) - 1 - at))
    low, high = at - around, at + around + 1
    number = counts[high] - counts[low]
    return np.where(there, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
