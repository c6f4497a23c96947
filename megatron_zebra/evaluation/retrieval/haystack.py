"""The text around what is planted, as one stream of tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.documents import documents
from megatron_zebra.data.indexed import IndexedPair, pair_paths
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks
from megatron_zebra.data.tokenizer import Tokenizer
from megatron_zebra.errors import UserError

_READ = 1 << 20  # tokens read of a text at least, if it has them
_CONTEXTS = 32  # and so many times the longest context
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s*$|\n\s*$")

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Haystack:
    """``tokens`` int32 [n] of documents one after another, and after which of them a sentence ends: bool [n]. From ``anew``
    on (None: nowhere) the text is repeated."""

    tokens: Tokens
    ends: npt.NDArray[np.bool_]
    anew: int | None = None

    def draw(self, generator: np.random.Generator, count: int) -> "Haystack":
        """``count`` tokens (all, if there are fewer) from a random place on: where a sentence begins, if one does soon.

        The same whatever longer contexts there are, for which more was read or repeated.
        """
        there = min(self.tokens.size, _most(count))
        if self.anew is not None:
            there = min(there, max(self.anew, count))
        spare = max(0, there - count)
        place = int(generator.integers(spare + 1))
        begins = np.flatnonzero(self.ends[place:spare])[:1] + 1
        start = place + int(begins[0]) if place and begins.size else place
        return Haystack(self.tokens[start : start + count], self.ends[start : start + count])

    def place(self, depth: float, room: int, strata: int) -> int:
        """Before which of the first ``room`` tokens something at ``depth`` belongs: where a sentence ends, the nearest to
        it that lies in the same one of ``strata`` equal parts, else anywhere."""
        wanted = int(depth * room)
        near = np.flatnonzero(self.ends[:room]) + 1
        near = near[(near * strata // room).clip(max=strata - 1) == int(depth * strata)]
        return int(near[np.abs(near - wanted).argmin()]) if near.size else wanted


def open_haystack(paths: Sequence[str], tokenizer: Tokenizer, longest: int, repeat: bool) -> Haystack:
    """The text of files and folders, or of the indexed pairs of these prefixes.

    Args:
        longest: tokens of the longest context; of a long text only so much is read as gives many different ones.
        repeat: whether a text shorter than ``longest`` begins anew at its end.

    Raises:
        UserError: a file is not readable, there is no text, or a pair was made with another tokenizer.
    """
    most = _most(longest)
    parts: list[Tokens] = []
    size = 0
    for path in paths:
        try:
            read = _of_pair if _is_pair(path) else _of_files
            parts.append(read(path, tokenizer, most - size))
        except UserError as error:
            raise UserError(f"--text {error}") from None
        size += parts[-1].size
        if size >= most:
            break
    tokens = np.concatenate(parts)
    if not tokens.size:
        raise UserError(f"--text {' '.join(paths)}: holds no text")
    anew = None
    if repeat and tokens.size < longest:
        anew, tokens = tokens.size, np.resize(tokens, longest)
    kinds, which = np.unique(tokens, return_inverse=True)
    ends = np.array([_SENTENCE_END.search(tokenizer.decode([token])) is not None for token in kinds.tolist()])
    return Haystack(tokens, ends[which], anew)


def _most(length: int) -> int:
    """Tokens that contexts of ``length`` are drawn from, where there are so many."""
    return max(_READ, _CONTEXTS * length)


def _is_pair(path: str) -> bool:
    return not Path(path).exists() and pair_paths(path)[1].is_file()


def _of_pair(prefix: str, tokenizer: Tokenizer, most: int) -> Tokens:
    pair = IndexedPair(prefix)
    if pair.info is not None and pair.info.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"{prefix}: written with another tokenizer ({pair.info.tokenizer_name}) than the model's ({tokenizer.name})"
        )
    tokens = pair.tokens[: 2 * most].astype(np.int32)  # of which half at most end a document
    if tokens.max(initial=0) >= tokenizer.vocab_size or tokens.min(initial=0) < 0:
        raise UserError(f"{prefix}: holds id {tokens.max()}, the tokenizer has the ids 0 to {tokenizer.vocab_size - 1}")
    return tokens[tokens != tokenizer.eod_id][:most]


def _of_files(path: str, tokenizer: Tokenizer, most: int) -> Tokens:
    options = InputOptions()
    ids: list[int] = []
    for file in find_files([Path(path)], options):
        for chunk in read_chunks(file, options):
            for text in documents(chunk, options):
                ids += tokenizer.encode(text)
                if len(ids) >= most:
                    return np.array(ids[:most], np.int32)
    return np.array(ids, np.int32)
