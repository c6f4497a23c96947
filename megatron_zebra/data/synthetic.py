"""Seeded documents made on the fly: a source without files, for smoke tests and benchmarks.

A document is a sequence of phrases from a small lexicon, some of them repeats of what the document said before: both
the inside of a phrase and the repeats can be learnt, so the loss of a working model falls within a few steps.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_zebra.data.permutation import derive_key
from megatron_zebra.data.source import Mask, Tokens
from megatron_zebra.errors import UserError

EOD = 0  # ends every document and occurs nowhere else
_PHRASES = 64
_LONGEST = 12  # tokens a phrase
_REPEATED = 0.3  # share of phrases that repeat an earlier one of the document


class SyntheticSource:
    """``documents`` documents with lengths spread exponentially about ``mean_length`` tokens (2 at least)."""

    def __init__(
        self,
        documents: int,
        mean_length: int,
        vocab_size: int,
        seed: int,
        name: str = "synthetic",
        part: range | None = None,
    ) -> None:
        if documents < 1 or mean_length < 2 or vocab_size < 2:
            raise UserError(
                f"synthetic data: {documents} documents of mean length {mean_length} over {vocab_size} tokens: "
                "allowed are >= 1, >= 2 and >= 2"
            )
        self.name = name
        part = range(documents) if part is None else part
        self.documents = len(part)
        self.cache_dir: Path | None = None
        self._first = part.start
        self._seed, self._vocab_size, self._mean_length = seed, vocab_size, mean_length
        generator = np.random.Generator(np.random.PCG64(derive_key("synthetic lengths", seed)))
        lengths = np.maximum(2, generator.exponential(mean_length, documents).astype(np.int64))[part.start : part.stop]
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self._bounds[-1])
        if not self.tokens:
            raise UserError(f"{name}: an empty data set; give this split a larger share, or more documents")
        lexicon = np.random.Generator(np.random.PCG64(derive_key("synthetic lexicon", seed)))
        self._phrases = lexicon.integers(1, vocab_size, (_PHRASES, _LONGEST))
        self._lengths = lexicon.integers(3, _LONGEST + 1, _PHRASES)
        self._document = lru_cache(maxsize=256)(self._make_document)

    @property
    def fingerprint(self) -> str:
        last = self._first + self.documents
        return f"synthetic:{self._seed}:{self._mean_length}:{self._vocab_size}:{self._first}:{last}:{self.tokens}"

    def read(self, start: int, stop: int) -> Tokens:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} outside [0, {self.tokens}]")
        if start == stop:
            return np.zeros(0, np.int64)
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        last = int(np.searchsorted(self._bounds, stop, "left"))
        tokens = np.concatenate([self._document(number) for number in range(first, last)])
        return tokens[start - self._bounds[first] : stop - self._bounds[first]]

    def read_mask(self, start: int, stop: int) -> Mask | None:
        return None

    def bounds(self, start: int, stop: int) -> Tokens:
        first, last = np.searchsorted(self._bounds, [start, stop], "right")
        return self._bounds[first:last]

    def document_bounds(self) -> Tokens:
        return self._bounds

    def _make_document(self, number: int) -> Tokens:
        """The tokens of a document, its EOD last: a function of the seed and its number alone."""
        length = int(self._bounds[number + 1] - self._bounds[number])
        generator = np.random.Generator(np.random.PCG64(derive_key("synthetic", self._seed, self._first + number)))
        count = length // 3 + 1  # phrases enough, the shortest having 3 tokens
        choice = (_PHRASES * generator.random(count) ** 2).astype(np.int64)  # some phrases are commoner than others
        repeats = np.flatnonzero(generator.random(count) < _REPEATED)
        choice[repeats] = choice[(repeats * generator.random(repeats.size)).astype(np.int64)]
        kept = np.arange(_LONGEST) < self._lengths[choice][:, None]
        tokens = self._phrases[choice][kept][:length]
        tokens[-1] = EOD
        return tokens
