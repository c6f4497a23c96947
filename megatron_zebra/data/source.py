"""Sources: streams of tokens with document bounds, and their split into training, validation and test."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise
from math import fsum, inf
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.errors import UserError

Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
SPLITS = ("train", "valid", "test")


class Source(Protocol):
    """A finite stream of ``tokens`` tokens, cut into ``documents`` documents. Offsets count tokens of the source."""

    name: str
    tokens: int
    documents: int
    cache_dir: Path | None  # where what is derived from the source is kept by default; None: nowhere

    @property
    def fingerprint(self) -> str:
        """A name for the content; the same wherever the data lies."""

    def read(self, start: int, stop: int) -> Tokens:
        """The tokens [stop - start] of 0 <= start <= stop <= tokens; UserError for ids outside the vocabulary."""

    def read_mask(self, start: int, stop: int) -> Mask | None:
        """Which of the tokens [stop - start] count in the loss when they are predicted; None: all of them."""

    def bounds(self, start: int, stop: int) -> Tokens:
        """The document bounds b with start < b <= stop, ascending; the end of the source is one."""

    def document_bounds(self) -> Tokens:
        """All bounds [documents + 1], with 0: takes time in proportion to the documents (best_fit packing only)."""


def split_documents(documents: int, shares: Sequence[float]) -> list[range]:
    """Contiguous ranges of documents in proportion to shares, together all of them.

    A positive share gets at least one document as long as there are enough; which then come from the largest part.
    """
    if not shares or min(shares) < 0 or not 0 < sum(shares) < inf:
        raise UserError(f"data.split: {list(shares)}: shares must be >= 0, their sum positive and finite")
    bounds = [round(documents * fsum(shares[:n]) / fsum(shares)) for n in range(len(shares) + 1)]
    counts = [last - first for first, last in pairwise(bounds)]
    for place, share in enumerate(shares):
        if share > 0 and counts[place] == 0 and max(counts) > 1:
            counts[counts.index(max(counts))] -= 1
            counts[place] = 1
    edges = [sum(counts[:n]) for n in range(len(counts) + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


class FileSource:
    """A range of a pair's documents as a source. Ids are checked against ``vocab_size`` (None: unchecked) as they are read."""

    def __init__(
        self, pair: IndexedPair, documents: range | None = None, vocab_size: int | None = None, name: str | None = None
    ) -> None:
        documents = range(pair.documents) if documents is None else documents
        self.pair = pair
        self.name = name or pair.bin_path.stem
        self.documents = len(documents)
        self.cache_dir: Path | None = pair.bin_path.parent / "packing_cache"
        self._bounds = range(documents.start, documents.stop + 1)  # documents and the bound past the last
        self._vocab_size = vocab_size
        self._base = pair.document_start(documents.start)
        self.tokens = pair.document_start(documents.stop) - self._base
        if self.tokens <= 0:
            raise UserError(
                f"{pair.prefix}: documents {documents.start} to {documents.stop} of {pair.documents} hold no token: an empty "
                "data set; give this split a larger share, or more documents"
            )

    @property
    def fingerprint(self) -> str:
        return f"{self.pair.fingerprint()}:{self._bounds.start}:{self._bounds.stop}"

    def read(self, start: int, stop: int) -> Tokens:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} outside [0, {self.tokens}]")
        self._check_layout(start, stop)
        tokens = self.pair.tokens[self._base + start : self._base + stop].astype(np.int64)
        if self._vocab_size is not None and tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
            raise UserError(
                f"{self.pair.bin_path}: token {self._base + start + wrong} is id {tokens[wrong]}, but the vocabulary has the "
                f"ids 0 to {self._vocab_size - 1}; was it written with another tokenizer?"
            )
        return tokens

    def read_mask(self, start: int, stop: int) -> Mask | None:
        if self.pair.mask is None:
            return None
        return self.pair.mask[self._base + start : self._base + stop] != 0

    def bounds(self, start: int, stop: int) -> Tokens:
        first = bisect_right(self._bounds, self._base + start, key=self.pair.document_start)
        last = bisect_right(self._bounds, self._base + stop, lo=first, key=self.pair.document_start)
        starts = self.pair.document_starts(self._bounds.start + first, self._bounds.start + last) - self._base
        return np.unique(starts)  # an empty document begins where the next one does

    def document_bounds(self) -> Tokens:
        return self.pair.document_starts(self._bounds.start, self._bounds.stop) - self._base

    def _check_layout(self, start: int, stop: int) -> None:
        width = self.pair.dtype.itemsize
        first = bisect_right(self.pair.pointers, (self._base + start) * width) - 1
        last = bisect_left(self.pair.pointers, (self._base + stop) * width)
        self.pair.check_contiguous(max(first, 0), last)


def is_masked(source: Source) -> bool:
    """Whether only some tokens of a source count in the loss, as in conversations."""
    return source.read_mask(0, 0) is not None


def check_fits(source: Source, length: int) -> None:
    """UserError if a conversation (a document of a masked source) is longer than a row of ``length`` tokens.

    Packing would cut it, and an answer would lose the question that it answers.
    """
    if not is_masked(source):
        return
    lengths = np.diff(source.document_bounds())
    if count := int((lengths > length).sum()):
        raise UserError(
            f"{source.name}: {count} of its {lengths.size} conversations are longer than a row of {length} tokens (the longest "
            f"has {lengths.max()}) and would be cut; leave them out with max_document_tokens: {length}, take rows of "
            f"{lengths.max()} or more, or write the data anew with --max-length {length}"
        )


def check_vocabulary(pair: IndexedPair, vocab_size: int, tokenizer_hash: str | None = None) -> str | None:
    """Compare a pair's .json with the model's vocabulary and, where given, the tokenizer's hash; no token is read.

    UserError if they do not fit. A pair without .json gives a warning to print; its ids are checked as they are read.
    """
    info = pair.info
    if info is None:
        return f"{pair.prefix}: no .json beside it, so its tokenizer is unknown; ids are checked as they are read"
    if tokenizer_hash is not None and info.tokenizer_hash != tokenizer_hash:
        raise UserError(
            f"{pair.prefix}: written with another tokenizer ({info.tokenizer_name}, {info.vocab_size} tokens, sha256 "
            f"{info.tokenizer_hash[:12]}) than data.tokenizer (sha256 {tokenizer_hash[:12]})"
        )
    if info.largest_id >= vocab_size:
        raise UserError(
            f"{pair.prefix}: holds id {info.largest_id} (tokenizer {info.tokenizer_name}, {info.vocab_size} tokens), "
            f"but model.vocab_size is {vocab_size}; allowed is {info.largest_id + 1} or more"
        )
    return None


def other_tokenizer(pair: IndexedPair, beside: Collection[str]) -> str | None:
    """A warning if the pair was written with none of the tokenizers ``beside`` the model, by their hashes. No error: the
    same vocabulary may be in another file."""
    if pair.info is None or not beside or pair.info.tokenizer_hash in beside:
        return None
    return (
        f"{pair.prefix}: written with another tokenizer ({pair.info.tokenizer_name}, {pair.info.vocab_size} tokens) than the "
        "one beside the model; unless both have the same vocabulary, its losses mean nothing"
    )
