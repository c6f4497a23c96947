"""Megatron's indexed pair: P.bin holds the tokens, P.idx where each sequence and document begins.

``.idx``, little-endian: magic ``MMIDIDX\\0\\0``, version 1 (uint64), type code (uint8), number of sequences n and of
document bounds d (uint64 each), then lengths int32 [n] in tokens, pointers int64 [n] in bytes, and document bounds
int64 [d]: document i is the sequences bounds[i] .. bounds[i + 1]. This project adds P.json: the tokenizer and the
largest id, so that data and vocabulary are compared without reading the tokens; pairs without one are welcome.

P.loss, where P.json says that there is one: a byte for each token of P.bin, 1 = it counts as a target of the loss, 0 = not.
"""

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_zebra.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
FORMAT_VERSION = 1  # of P.json
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_PROBES = 64  # sequences looked at when a pair is opened, whatever its size: each may be a read from a slow disk


def token_type(vocab_size: int) -> type[np.integer]:
    """The type tokens are stored in: uint16 below 65500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def pair_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a prefix; the prefix may hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def mask_path(prefix: str | Path) -> Path:
    """The loss mask of a prefix. Not named .bin: P.loss.bin would be the tokens of the prefix P.loss."""
    return Path(f"{prefix}.loss")


@dataclass(frozen=True)
class PairInfo:
    """What P.json says of a pair."""

    tokenizer_hash: str
    tokenizer_kind: str
    tokenizer_name: str
    vocab_size: int
    eod_id: int
    largest_id: int
    documents: int
    tokens: int
    text_bytes: int = 0  # of the text that was tokenized, for bits per byte; 0 = not known
    format_version: int = FORMAT_VERSION
    loss_tokens: int = 0  # ones in P.loss; 0 = there is no such file, and every token counts

    def dump(self) -> str:
        """The text of the .json file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_info(prefix: str | Path) -> PairInfo | None:
    """P.json, or None where there is none (a foreign pair); UserError if it is damaged."""
    path = pair_paths(prefix)[2]
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise _foreign(path, str(error)) from None
    if not isinstance(values, dict):
        raise _foreign(path, f"{type(values).__name__} instead of an object")
    values.setdefault("loss_tokens", 0)  # of a pair from before there were masks
    for field in fields(PairInfo):
        value = values.get(field.name)
        if type(value) is not field.type or (isinstance(value, int) and value < 0):
            raise _foreign(path, f"{field.name} = {value!r}")
    if values["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {values['format_version']}; only {FORMAT_VERSION} can be read: write the pair anew"
        )
    return PairInfo(**{field.name: values[field.name] for field in fields(PairInfo)})


def _foreign(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a description written by preprocess_data.py ({reason}); remove or rebuild it")


class IndexedPair:
    """A pair opened for reading. Opening takes the same time whatever the size of the corpus.

    ``tokens`` [T] is the whole .bin as one memory-mapped array, ``documents`` the number of documents, ``mask`` uint8 [T]
    the tokens that count in the loss (1) or not (0), None where all do.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, _ = pair_paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                hint = " (give the prefix without .bin or .idx)" if self.prefix.endswith((".bin", ".idx")) else ""
                raise UserError(
                    f"{path}: no such file; a data prefix needs both {self.bin_path.name} and {self.idx_path.name}{hint}"
                )
        self._open_index()
        self._open_tokens()
        self.info = read_info(prefix)
        if self.info is not None and (self.info.documents, self.info.tokens) != (self.documents, self.tokens.size):
            raise UserError(
                f"{self.prefix}.json: describes {self.info.documents} documents of {self.info.tokens} tokens, but the pair "
                f"holds {self.documents} of {self.tokens.size}; it belongs to another pair"
            )
        self.mask = self._open_mask()

    def _open_index(self) -> None:
        size = self.idx_path.stat().st_size
        try:
            with self.idx_path.open("rb") as stream:
                head = stream.read(HEADER.size)
            self.bin_path.open("rb").close()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        if head[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.idx_path}: begins with {head[:9]!r}, not {MAGIC!r}: not an index of tokens")
        if len(head) < HEADER.size:
            raise UserError(f"{self.idx_path}: truncated, {size} bytes, fewer than the {HEADER.size} of its header")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{self.idx_path}: version {version}; only version {VERSION} can be read")
        if code not in CODES:
            raise UserError(f"{self.idx_path}: token type code {code}; allowed are {sorted(CODES)}")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size == expected + sequences and sequences:
            raise UserError(f"{self.idx_path}: a multimodal index (a mode for each sequence); only text can be read")
        if size != expected:
            what = "truncated, " if size < expected else ""
            raise UserError(
                f"{self.idx_path}: {what}{size} bytes, but {sequences} sequences and {bounds} document bounds take {expected}"
            )
        if not sequences or bounds < 2:
            raise UserError(f"{self.idx_path}: an empty data set, without any document")
        self.dtype = np.dtype(CODES[code]).newbyteorder("<")
        raw = np.memmap(self.idx_path, mode="r", dtype=np.uint8).view(np.ndarray)  # plain arrays are quicker to slice
        # Views of unaligned bytes: safe to index and slice, but np.searchsorted would copy them whole.
        split = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
        self.lengths = raw[split[0] : split[1]].view("<i4")
        self.pointers = raw[split[1] : split[2]].view("<i8")
        self.bounds = raw[split[2] : split[3]].view("<i8")
        self.documents = bounds - 1

    def _open_tokens(self) -> None:
        size, width = self.bin_path.stat().st_size, self.dtype.itemsize
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * width
        if size != end:
            what = "truncated, " if size < end else ""
            raise UserError(
                f"{self.bin_path}: {what}{size} bytes, but {self.idx_path.name} describes {end} (type {self.dtype.name}); "
                "the two files do not belong together"
            )
        if int(self.bounds[0]) != 0 or int(self.bounds[-1]) != self.lengths.size:
            raise UserError(
                f"{self.idx_path}: documents cover the sequences {self.bounds[0]} to {self.bounds[-1]}, "
                f"but there are {self.lengths.size}"
            )
        if size == 0:
            raise UserError(f"{self.bin_path}: an empty data set, without any token")
        probes = np.unique(np.linspace(0, self.lengths.size - 1, _PROBES).astype(np.int64))
        for number in probes:
            self.check_contiguous(int(number), int(number) + 1)
        self.tokens: npt.NDArray[np.integer] = np.memmap(self.bin_path, mode="r", dtype=self.dtype).view(np.ndarray)

    def _open_mask(self) -> npt.NDArray[np.uint8] | None:
        """A mask that is missing, or that nobody vouches for, would change what is trained on without a word."""
        path = mask_path(self.prefix)
        if self.info is None or not self.info.loss_tokens:
            if path.exists():
                raise UserError(f"{path}: a loss mask that {self.prefix}.json does not tell of; write the pair anew")
            return None
        try:
            size = path.stat().st_size
            mask = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray) if size else np.zeros(0, np.uint8)
        except OSError as error:
            raise UserError(
                f"{path}: the loss mask of {self.bin_path.name} cannot be read ({error.strerror}); without it every token "
                "would count"
            ) from None
        if size != self.tokens.size:
            raise UserError(
                f"{path}: {size} bytes for the {self.tokens.size} tokens of {self.bin_path.name}; the two do not belong together"
            )
        return mask

    def check_contiguous(self, first: int, last: int) -> None:
        """UserError unless sequences first .. last lie one after another in the .bin, with sensible lengths.

        Every writer that appends makes such files, and reading the corpus as one stream rests on it. Some
        sequences are probed at the opening and the rest as they are read, so a file laid out otherwise is refused
        rather than misread, and no start-up scan is needed.
        """
        ends = self.pointers[first:last] + self.lengths[first:last].astype(np.int64) * self.dtype.itemsize
        after = self.pointers[first + 1 : last + 1]
        good = self.lengths[first:last].min(initial=0) >= 0 and bool((ends[: after.size] == after).all())
        if not good or (first == 0 and int(self.pointers[0]) != 0):
            raise UserError(
                f"{self.idx_path}: sequences {first} to {last} do not lie one after another in {self.bin_path.name}; "
                "the index is damaged, or from a writer that leaves gaps: write the pair anew"
            )

    def document_start(self, document: int) -> int:
        """Where a document begins, in tokens; of ``documents`` itself: the number of tokens."""
        sequence = int(self.bounds[document])
        if not 0 <= sequence <= self.lengths.size:
            raise UserError(
                f"{self.idx_path}: document {document} begins at sequence {sequence} of {self.lengths.size}"
            )
        return (
            self.tokens.size if sequence == self.lengths.size else int(self.pointers[sequence]) // self.dtype.itemsize
        )

    def document_starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where the documents first .. last begin, in tokens: int64 [last - first]; the bound past the last counts."""
        sequences = self.bounds[first:last].astype(np.int64)
        if sequences.size and not (
            0 <= sequences[0] <= sequences[-1] <= self.lengths.size and (np.diff(sequences) >= 0).all()
        ):
            raise UserError(
                f"{self.idx_path}: documents {first} to {last} are not in order within its {self.lengths.size} sequences"
            )
        starts = self.pointers[np.minimum(sequences, self.lengths.size - 1)].astype(np.int64) // self.dtype.itemsize
        return np.where(sequences == self.lengths.size, self.tokens.size, starts)

    def fingerprint(self) -> str:
        """A name for the content: sizes and sampled blocks of the files, the mask too; not the path, nor dates."""
        digest = hashlib.sha256(self.info.tokenizer_hash.encode() if self.info else b"")
        masks = [] if self.mask is None else [mask_path(self.prefix)]
        for path in (self.idx_path, self.bin_path, *masks):
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(struct.pack("<Q", size))
                for offset in np.linspace(0, max(0, size - 4096), 64).astype(np.int64):
                    stream.seek(int(offset))
                    digest.update(stream.read(4096))
        return digest.hexdigest()
