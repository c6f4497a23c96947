"""Pseudo-random permutations of [0, n) that take no memory: any element is computed alone.

A shuffled array would do the same for small data, but costs memory and start-up time in proportion to the corpus.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

_ROUNDS = 8  # of the Feistel network; even for n = 4 every permutation then comes up about equally often
_MASK = 0xFFFFFFFFFFFFFFFF
Words: TypeAlias = Any  # one Python int, or an array of uint64: the arithmetic is the same


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; the same on every machine, and other parts give an unrelated key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=4096)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(derive_key(key, number) for number in range(_ROUNDS))


def _mix(x: Words, key: int) -> Words:
    """The finaliser of SplitMix64: 64 bits to 64 well-mixed bits."""
    x = (x + key) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of [0, size): ``permutation(i)`` for one index, ``permutation.array(indices)`` for many.

    A Feistel network over Z_a x Z_b, a nearly square rectangle with a·b >= size; what falls outside [0, size) is
    permuted again until it falls inside (cycle walking), which happens to about one index in sqrt(size).
    """

    size: int
    key: int

    def __post_init__(self) -> None:
        if not 0 < self.size < 1 << 62:
            raise ValueError(f"a permutation needs 0 < size < 2**62, not {self.size}")

    def __call__(self, index: int) -> int:
        """The image of one index; IndexError outside [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside [0, {self.size})")
        result = self._network(int(index))
        while result >= self.size:
            result = self._network(result)
        return result

    def array(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The images [n] of indices [n], all of which must lie in [0, size)."""
        result = self._network(indices.astype(np.uint64))
        outside = np.flatnonzero(result >= self.size)
        while outside.size:
            result[outside] = self._network(result[outside])
            outside = outside[result[outside] >= self.size]
        return result.astype(np.int64)

    def _network(self, x: Words) -> Words:
        width = isqrt(self.size - 1) + 1
        height = -(-self.size // width)
        left, right = x % width, x // width
        keys = _round_keys(self.key)
        for number in range(0, _ROUNDS, 2):
            left = (left + _mix(right, keys[number]) % width) % width
            right = (right + _mix(left, keys[number + 1]) % height) % height
        return left + right * width
