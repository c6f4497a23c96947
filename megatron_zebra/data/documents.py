"""From chunks of input to the texts of documents; every fault names the file and the line."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_zebra.data.inputs import Chunk, InputOptions
from megatron_zebra.errors import UserError

_BLANK_LINES = re.compile(r"(?:\A|\n)(?:[^\S\n]*\n)+")  # a chunk may begin within a run of them


def stop(error: UserError) -> None:
    """What to do with a document that cannot be read: raise the error."""
    raise error


def documents(chunk: Chunk, options: InputOptions, on_bad: Callable[[UserError], None] = stop) -> Iterator[str]:
    """The texts of a chunk, empty ones too; ``on_bad`` gets the error of each document that is not readable."""
    if isinstance(chunk.data, list):
        yield from (text or "" for text in chunk.data)
    elif chunk.format == "jsonl":
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line.strip():
                try:
                    yield _json_text(line, options.key, f"{chunk.path}, line {number}")
                except UserError as error:
                    on_bad(error)
    else:
        yield from _plain_texts(chunk, options, on_bad)


def _plain_texts(chunk: Chunk, options: InputOptions, on_bad: Callable[[UserError], None]) -> Iterator[str]:
    assert isinstance(chunk.data, bytes)
    if options.boundary == "line":
        for number, line in enumerate(chunk.data.removesuffix(b"\n").split(b"\n") if chunk.data else [], chunk.first):
            try:
                yield line.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                on_bad(UserError(f"{chunk.path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x})"))
        return
    try:
        text = chunk.data.decode()
    except UnicodeDecodeError as error:
        number = chunk.first + chunk.data.count(b"\n", 0, error.start)
        on_bad(UserError(f"{chunk.path}, line {number}: not UTF-8 (byte 0x{chunk.data[error.start]:02x})"))
        return
    if options.boundary == "file":
        yield text
    else:
        yield from (part for piece in _BLANK_LINES.split(text) if (part := piece.strip("\r\n")).strip())


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line of JSON; UserError beginning with ``where`` (file and line) if it is none."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be an object") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {type(value).__name__} instead of an object")
    return value


def _json_text(line: bytes, key: str, where: str) -> str:
    value = json_object(line, where)
    if key not in value:
        raise UserError(f"{where}: no key {key!r}; there are {', '.join(map(str, list(value)[:10]))} (--text-key)")
    text = value[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: key {key!r} holds {type(text).__name__} instead of text (--text-key)")
    if rb"\ud" in line.lower():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: key {key!r} holds half of a surrogate pair, which is no character") from None
    return text
