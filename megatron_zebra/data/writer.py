"""Writing an indexed pair: its files appear under their names when all of them are complete, or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.indexed import CODES, HEADER, MAGIC, VERSION, PairInfo, mask_path, pair_paths, token_type
from megatron_zebra.durable import sync, sync_folder
from megatron_zebra.errors import UserError

_BLOCK = 1 << 20  # sequences handled at once while the index is finished


@dataclass(frozen=True)
class Vocabulary:
    """What a writer must know of the tokenizer."""

    vocab_size: int
    eod_id: int
    hash: str
    kind: str
    name: str


class PairWriter:
    """Builds P.bin, P.idx and P.json, with ``masked`` P.loss too; memory does not grow with the corpus.

    Everything is written to P.*.tmp. ``finish`` renames .bin, .loss, .json and, last, .idx: a pair is there if and only if its
    .idx is. Leaving the ``with`` block without ``finish`` removes the temporary files; those of a killed process are
    overwritten by the next one. An existing pair is a UserError unless ``force``, which replaces it at ``finish``.
    """

    def __init__(self, prefix: str | Path, vocabulary: Vocabulary, force: bool = False, masked: bool = False) -> None:
        self._paths = (*pair_paths(prefix), mask_path(prefix))
        self._temporary = [path.with_name(path.name + ".tmp") for path in self._paths]
        self._vocabulary = vocabulary
        self._dtype = np.dtype(token_type(vocabulary.vocab_size)).newbyteorder("<")
        existing = [str(path) for path in self._paths if path.exists()]
        if existing and not force:
            raise UserError(f"{', '.join(existing)}: already there; choose another prefix, or replace with --force")
        self.documents, self.tokens, self.text_bytes, self._largest = 0, 0, 0, -1
        self.loss_tokens = 0
        self._loss: BinaryIO | None = None
        self._bin = _open_locked(self._temporary[0])
        try:
            self._idx = _open_locked(self._temporary[1])
            self._idx.write(bytes(HEADER.size))
            if masked:
                self._loss = _open_locked(self._temporary[3])
        except BaseException:
            self._bin.close()
            self._remove_temporary()
            raise

    def add(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: Sequence[int] | npt.NDArray[np.integer],
        text_bytes: int = 0,
        mask: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents: their tokens one after another [sum of lengths], the length of each [documents], how many
        bytes of text they were made from, and, in a masked pair, which tokens count in the loss [sum of lengths]."""
        if (mask is None) != (self._loss is None) or (mask is not None and mask.size != tokens.size):
            raise ValueError("a masked pair needs a mask for every token, another none")
        counts = np.asarray(lengths, np.int64)
        if counts.sum() != tokens.size or counts.min(initial=0) < 0:
            raise ValueError(f"{tokens.size} tokens for documents of {counts.sum()} together")
        if counts.max(initial=0) > np.iinfo(np.int32).max:
            raise UserError(f"a document of {counts.max()} tokens; the format allows {np.iinfo(np.int32).max}")
        if tokens.size:
            if tokens.min() < 0 or tokens.max() >= self._vocabulary.vocab_size:
                raise ValueError(f"ids {tokens.min()} to {tokens.max()}, vocabulary {self._vocabulary.vocab_size}")
            self._largest = max(self._largest, int(tokens.max()))
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._idx.write(counts.astype("<i4").tobytes())
        if self._loss is not None and mask is not None:
            self._loss.write((mask != 0).astype(np.uint8).tobytes())
            self.loss_tokens += int(np.count_nonzero(mask))
        self.documents += counts.size
        self.tokens += tokens.size
        self.text_bytes += text_bytes

    def finish(self) -> PairInfo:
        """Complete the files, flush them to the disk and give them their names; UserError if there was no token."""
        if not self.tokens:
            raise UserError(
                f"{self._paths[0].with_suffix('')}: nothing to write, the input holds no document with text"
            )
        known = self._vocabulary
        info = PairInfo(
            known.hash,
            known.kind,
            known.name,
            known.vocab_size,
            known.eod_id,
            self._largest,
            self.documents,
            self.tokens,
            self.text_bytes,
            loss_tokens=self.loss_tokens,
        )
        self._finish_index()
        with open(self._temporary[2], "wb") as description:
            description.write(info.dump().encode())
            sync(description)
        streams = [stream for stream in (self._bin, self._idx, self._loss) if stream is not None]
        for stream in streams:
            sync(stream)
        bin_path, idx_path, json_path, loss_path = self._paths
        idx_path.unlink(missing_ok=True)  # --force: from here to the end there is no pair
        if self._loss is None:
            for path in (loss_path, self._temporary[3]):  # of what is replaced, of a killed process
                path.unlink(missing_ok=True)
        renamed = [bin_path, *([loss_path] if self._loss is not None else []), json_path, idx_path]
        for path in renamed:
            os.replace(self._temporary[self._paths.index(path)], path)
        sync_folder(idx_path.parent)
        for stream in streams:
            stream.close()
        return info

    def abort(self) -> None:
        """Remove the temporary files; the names are left as they were. Does nothing after ``finish``."""
        if not self._idx.closed:
            for stream in filter(None, (self._bin, self._idx, self._loss)):
                with contextlib.suppress(OSError):  # the disk may be full: what is buffered cannot be written
                    stream.close()
            self._remove_temporary()

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _remove_temporary(self) -> None:
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def _finish_index(self) -> None:
        """The lengths are in the file already: add pointers and document bounds, then fill in the header."""
        end = 0
        for first in range(0, self.documents, _BLOCK):
            self._idx.seek(HEADER.size + 4 * first)
            raw = self._idx.read(4 * min(_BLOCK, self.documents - first))
            sizes = np.frombuffer(raw, "<i4").astype(np.int64) * self._dtype.itemsize
            ends = end + np.cumsum(sizes)
            self._idx.seek(0, os.SEEK_END)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        for first in range(0, self.documents + 1, _BLOCK):  # a document is one sequence
            self._idx.write(np.arange(first, min(first + _BLOCK, self.documents + 1), dtype="<i8").tobytes())
        code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == self._dtype.newbyteorder("="))
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1))


def _open_locked(path: Path) -> BinaryIO:
    """Open a temporary file for this process alone, emptied, and make its folder; UserError if that is not possible or
    another writes it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the folder must be writable") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(stream.fileno()), path.stat())  # else it was renamed since we opened it
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except OSError:
        alone = True  # a file system without locks
    if not alone:
        stream.close()
        raise UserError(f"{path}: another process is writing this pair; choose another prefix")
    stream.truncate(0)
    return stream
