"""What one process does with chunks of input: texts, or conversations, to tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.chat import conversations
from megatron_zebra.data.documents import documents
from megatron_zebra.data.inputs import Chunk, InputOptions
from megatron_zebra.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zebra.errors import UserError

if TYPE_CHECKING:
    from megatron_zebra.data.chat_template import ChatTemplate


@dataclass(frozen=True)
class ChatOptions:
    """Inputs are conversations. ``template`` replaces the tokenizer's; ``too_long`` says what becomes of a conversation of
    more than ``max_length`` tokens (None: as long as it likes)."""

    template: Path | None = None
    max_length: int | None = None
    too_long: Literal["error", "drop", "truncate"] = "error"


@dataclass(frozen=True)
class Job:
    """What to preprocess. ``workers`` processes tokenize; 1 does everything in this one."""

    inputs: list[Path]
    tokenizer: Path
    prefix: Path
    workers: int = 1
    options: InputOptions = field(default_factory=InputOptions)
    eod_token: str | None = None
    append_eod: bool = True
    skip_bad: bool = False
    force: bool = False
    chat: ChatOptions | None = None


@dataclass(frozen=True)
class Encoded:
    """The documents of one task, tokenized; ``mask`` uint8 [tokens] for conversations only."""

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    bad: list[str]
    size: int
    text_bytes: int = 0
    empty: int = 0
    mask: npt.NDArray[np.uint8] | None = None
    dropped: int = 0
    truncated: int = 0


Encode = Callable[[list[Chunk]], Encoded]


def make_encoder(job: Job, tokenizer: Tokenizer | None = None) -> Encode:
    """The work on one task of ``job``; UserError if the tokenizer is not fit for it."""
    if job.chat is None:
        known = tokenizer or load_tokenizer(job.tokenizer, job.eod_token)
        return lambda task: _encode_texts(task, known, job)
    from megatron_zebra.data.chat_template import ChatTemplate  # its libraries are slow to import

    chat, template = job.chat, ChatTemplate(job.tokenizer, job.chat.template)
    return lambda task: _encode_chats(task, template, chat, job)


class _Bad(list[str]):
    """Errors of documents that are left out; the first one is raised where none may be."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self._skip = skip

    def __call__(self, error: UserError) -> None:
        if not self._skip:
            raise error
        self.append(str(error))


def _encode_texts(task: list[Chunk], tokenizer: Tokenizer, job: Job) -> Encoded:
    bad = _Bad(job.skip_bad)
    texts = [text for chunk in task for text in documents(chunk, job.options, bad)]
    kept = [text for text in texts if text.strip()]
    end = [tokenizer.eod_id] if job.append_eod else []
    encoded = [ids + end for ids in tokenizer.encode_batch(kept)]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    tokens = np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))
    text_bytes = sum(len(text.encode()) for text in kept)
    return Encoded(tokens, lengths, list(bad), _size(task), text_bytes, len(texts) - len(kept))


def _encode_chats(task: list[Chunk], template: "ChatTemplate", chat: ChatOptions, job: Job) -> Encoded:
    bad = _Bad(job.skip_bad)
    tokens, masks, dropped, truncated = [], [], 0, 0
    for where, messages, _ in (found for chunk in task for found in conversations(chunk, bad)):
        try:
            rendered = template.encode(messages, where)
        except UserError as error:
            bad(error)
            continue
        size, limit = rendered.tokens.size, chat.max_length or rendered.tokens.size
        if size > limit and chat.too_long == "error":
            bad(
                UserError(
                    f"{where}: {size} tokens, above --max-length {limit} (--too-long drop or truncate lets it pass)"
                )
            )
        elif size > limit and (chat.too_long == "drop" or not rendered.mask[:limit].any()):
            dropped += 1
        else:
            truncated += size > limit
            tokens.append(rendered.tokens[:limit])
            masks.append(rendered.mask[:limit])
    lengths = np.array([part.size for part in tokens], np.int64)
    together = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    mask = np.concatenate(masks) if masks else np.zeros(0, np.uint8)
    return Encoded(together, lengths, list(bad), _size(task), mask=mask, dropped=dropped, truncated=truncated)


def _size(task: list[Chunk]) -> int:
    return sum(chunk.size for chunk in task)
