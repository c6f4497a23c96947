"""Input files as chunks of bytes: which files, in which format, decompressed, cut where documents end.

Reading is split in two. This half runs in one process and only moves bytes; ``documents.py`` decodes them, and may run in
many. Memory is bounded by the longest document and a few chunks.
"""

import gzip
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_zebra.errors import UserError

Format = Literal["jsonl", "text", "parquet"]
Boundary = Literal["file", "line", "blank-line"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 20  # bytes read at once
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read. ``boundary`` says what a document is in a plain-text file; ``key`` where JSON and Parquet keep it."""

    format: Format | Literal["auto"] = "auto"
    key: str = "text"
    boundary: Boundary = "file"
    glob: str = "*"


@dataclass(frozen=True)
class InputFile:
    """One file to read; ``size`` in bytes, as it lies on the disk."""

    path: Path
    format: Format
    compression: str
    size: int


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one file: bytes of lines or texts, or the strings of a Parquet column.

    ``first`` is the number of the first line (or row), from 1; ``size`` the bytes on the disk it stands for.
    """

    path: str
    format: Format
    first: int
    data: bytes | list[str | None]
    size: int


def find_files(paths: list[Path], options: InputOptions) -> list[InputFile]:
    """The files of these paths: files as given, folders searched to any depth for ``glob``, sorted, without hidden ones."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in _matching(path, options.glob) if p.is_file() and not _hidden(p.relative_to(path))
            )
            if not inside:
                raise UserError(f"{path}: a folder without a file that matches {options.glob!r}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return [_describe(path, options) for path in files]


def read_chunks(file: InputFile, options: InputOptions) -> Iterator[Chunk]:
    """The chunks of a file, in order; UserError where it cannot be read, naming it."""
    try:
        if file.format == "parquet":
            yield from _parquet_chunks(file, options)
        else:
            yield from _byte_chunks(file, options)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file.path}: cannot be read ({_reason(error)})") from None


def refuse_outputs(files: list[InputFile], outputs: Iterable[Path]) -> None:
    """UserError if one of ``outputs`` is an input: it would be replaced by what is made of it, or be read the next time."""
    there = [path for path in outputs if path.exists()]
    for file in files:
        for path in there:
            if file.path.samefile(path):
                raise UserError(f"{path}: is read as an input too (--input); choose another name for the output")


def _matching(folder: Path, glob: str) -> list[Path]:
    try:
        return list(folder.rglob(glob))
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--glob {glob!r}: {error}; allowed is a pattern of names in the folder, as '*.py'") from None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:200]


def _describe(path: Path, options: InputOptions) -> InputFile:
    compression = path.suffix if path.suffix in _COMPRESSED else ""
    inner = path.with_suffix("") if compression else path
    format = options.format if options.format != "auto" else _FORMATS.get(inner.suffix.lower(), "text")
    return InputFile(path, format, compression, path.stat().st_size)


def _blocks(file: InputFile) -> Iterator[tuple[bytes, int]]:
    """The decompressed bytes, block by block, each with how far the file on the disk has been read."""
    with file.path.open("rb") as raw:
        if file.compression == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                while block := stream.read(_BLOCK):
                    yield block, raw.tell()
        elif file.compression == ".zst":
            yield from _zstd_blocks(raw)
        else:
            while block := raw.read(_BLOCK):
                yield block, raw.tell()


def _zstd_blocks(raw: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """zstandard's own stream reader takes a truncated file for a complete one; this does not."""
    import zstandard

    frame = None
    try:
        while data := raw.read(_BLOCK // 4):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data), raw.tell()
                data = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{raw.name}: cannot be read ({error})") from None
    if frame is not None:
        raise UserError(f"{raw.name}: cannot be read (the compressed data ends too early)")


def _byte_chunks(file: InputFile, options: InputOptions) -> Iterator[Chunk]:
    """Cut after the last document that a block completes."""
    boundary = "line" if file.format == "jsonl" else options.boundary
    parts: list[bytes] = []
    line, done, at = 1, 0, 0
    for block, at in _blocks(file):
        cut = _last_end(parts[-1] if parts else b"", block, boundary)
        if cut:
            data = b"".join([*parts, block[:cut]])
            yield _byte_chunk(file, line, data, at - done)
            line, done, parts = line + data.count(b"\n"), at, []
        parts.append(block[cut:])
    yield _byte_chunk(file, line, b"".join(parts), at - done)


def _byte_chunk(file: InputFile, line: int, data: bytes, size: int) -> Chunk:
    return Chunk(str(file.path), file.format, line, data.removeprefix(_BOM) if line == 1 else data, size)


def _last_end(before: bytes, block: bytes, boundary: Boundary) -> int:
    """Where the last complete document of a block ends; 0 if none does."""
    if boundary == "file":
        return 0
    if boundary == "line":
        return block.rfind(b"\n") + 1
    end = len(block)
    while (end := block.rfind(b"\n", 0, end)) >= 0:  # a blank line: only white space up to the line end before
        previous = block.rfind(b"\n", 0, end)
        if previous < 0 and before:
            return 0  # the blank line may begin in the block before: wait for a clear one
        if not block[previous + 1 : end].strip() and previous >= 0:
            return end + 1
    return 0


def _parquet_chunks(file: InputFile, options: InputOptions) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as plain:
        source: Any = file.path
        if file.compression:
            for block, _ in _blocks(file):
                plain.write(block)
            plain.seek(0)
            source = plain
        try:
            table = pyarrow.parquet.ParquetFile(source)
            names = table.schema_arrow.names
            if options.key not in names:
                raise UserError(f"{file.path}: no column {options.key!r}; there are {', '.join(names)} (--text-key)")
            kind = table.schema_arrow.field(options.key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{file.path}: column {options.key!r} holds {kind}, not text (--text-key)")
            row, done = 1, 0
            for batch in table.iter_batches(batch_size=256, columns=[options.key]):
                end = file.size * (row - 1 + batch.num_rows) // table.metadata.num_rows
                yield Chunk(str(file.path), "parquet", row, batch.column(0).to_pylist(), end - done)
                row, done = row + batch.num_rows, end
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{file.path}: cannot be read as Parquet ({_reason(error)})") from None
