"""A tokenizer's own chat template: messages to tokens, and which of them the assistant says."""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_zebra.data.chat import Message
from megatron_zebra.errors import UserError

Span = tuple[int, int]  # characters [start, stop) of a rendered conversation
_rendering = threading.Lock()  # transformers keeps the marks of a rendering in the compiled template, which it shares
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens [n] (int32), ``mask`` uint8 [n] the assistant's (1), and the tokens of each of its turns.

    A turn's tokens are what a model has to generate: without the header that names the assistant, with the token that
    ends the turn.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    turns: list[Span]


class ChatTemplate:
    """Renders and tokenizes conversations. ``folder`` holds tokenizer.json and its tokenizer_config.json (or names the
    former); ``template_file`` replaces the template in it.

    Templates that mark what the assistant says ({% generation %}) are believed, but for the token that ends the turn,
    which counts always. Of the others, a turn is what rendering up to it adds to rendering up to its header.

    Raises:
        UserError: the tokenizer has no template, or it cannot be read.
    """

    def __init__(self, folder: Path, template_file: Path | None = None) -> None:
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if file.suffix != ".json" or not file.is_file():
            raise UserError(f"{folder}: no tokenizer.json, which chat data needs; a Hugging Face folder holds one")
        settings = _settings(file.parent)
        self._template, self.name = _template(settings, file.parent, template_file)
        self._variables: dict[str, Any] = dict(settings.special_tokens_map)
        self._marked = _GENERATION.search(self._template) is not None
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(str(file))
        self._model.no_truncation()
        self._model.no_padding()
        names = [token.content for token in self._model.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    def encode(self, messages: Sequence[Message], where: str) -> Rendered:
        """Tokens and mask of a conversation; UserError beginning with ``where`` if the template cannot render it, or if
        what the assistant says in it cannot be told apart."""
        for number, message in enumerate(messages, 1):
            if found := self.special_in(message["content"]):
                raise UserError(f"{where}, message {number}: its text holds the special token {found!r}")
        text, spans = self._generated(messages, where) if self._marked else self._by_prefixes(messages, where)
        encoding = self._model.encode(text, add_special_tokens=False)
        starts = self._starts(encoding)
        mask = np.zeros(starts.size, np.uint8)
        turns = []
        for start, stop in (self._with_end(text, span) for span in spans):
            first, last = np.searchsorted(starts, [start, stop])
            if first == last:
                raise UserError(f"{where}: no token of its own for a turn of the assistant under {self.name}")
            mask[first:last] = 1
            turns.append((int(first), int(last)))
        return Rendered(np.array(encoding.ids, np.int32), mask, turns)

    def prompt(self, messages: Sequence[Message], where: str) -> list[int]:
        """Tokens of a conversation, and of the header under which the assistant is to speak next."""
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant" and (found := self.special_in(message["content"])):
                raise UserError(f"{where}, message {number}: its text holds the special token {found!r}")
        return self.tokens(self._render(messages, where, prompt=True)[0])

    def tokens(self, text: str) -> list[int]:
        """Of a text that a template has made: the names of special tokens in it are these tokens."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def around(self) -> tuple[str, str]:
        """Of one question and its answer: what comes before the question, and what between the two."""
        question, answer = "QUESTION-4517", "ANSWER-4517"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = self._render(messages, "a question and its answer")[0]
        before, _, rest = text.partition(question)
        middle, found, _ = rest.partition(answer)
        if not found:
            raise UserError(f"{self.name} does not show a question and its answer as they are given")
        return before, middle

    def end_of_turn(self) -> set[int]:
        """The special token with which an assistant's turn ends; none if the template has none there."""
        answer = "ANSWER-4517"
        messages = [{"role": "user", "content": "QUESTION-4517"}, {"role": "assistant", "content": answer}]
        after = self._render(messages, "a question and its answer")[0].rpartition(answer)[2].lstrip()
        found = self._special.match(after)
        token = self._model.token_to_id(found[0]) if found else None
        return set() if token is None else {token}

    def special_in(self, text: str) -> str | None:
        """The first special token that a text spells out, which no message may."""
        found = self._special.search(text)
        return found[0] if found else None

    def token_starts(self, text: str) -> npt.NDArray[np.int64]:
        """At which character each token of a plain text begins."""
        return self._starts(self._model.encode(text, add_special_tokens=False))

    def _generated(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        text, spans = self._render(messages, where, marks=True)
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != turns:
            raise UserError(
                f"{where}: {self.name} marks {len(spans)} turns as generated, but the assistant has {turns}"
            )
        return text, spans

    def _by_prefixes(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        text, spans = self._render(messages, where)[0], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not number:
                raise UserError(
                    f"{where}: begins with a turn of the assistant, whose header {self.name} does not tell; give a template "
                    "with {% generation %} marks (--chat-template)"
                )
            plain = self._render(messages[:number], where)[0]
            header = self._render(messages[:number], where, prompt=True)[0]
            whole = self._render(messages[: number + 1], where)[0]
            start = len(header)
            if header == plain:  # the template has no generation prompt: what comes before the words is the header
                start += _before(whole[start:], message["content"])
            if not (text.startswith(whole) and whole.startswith(header) and start < len(whole)):
                raise UserError(
                    f"{where}: {self.name} renders message {number + 1} otherwise at the end of a conversation than within it, or "
                    "changes what comes before, so what the assistant says cannot be told; give a template with "
                    "{% generation %} marks (--chat-template)"
                )
            spans.append((start, len(whole)))
        return text, spans

    def _with_end(self, text: str, span: Span) -> Span:
        """The span up to the special token that ends the turn, without what only separates turns."""
        start, stop = span
        inside = list(self._special.finditer(text, start, stop))
        if inside and not text[inside[-1].end() : stop].strip():
            return start, inside[-1].end()
        after = self._special.match(text, stop)
        return start, after.end() if after else stop

    @staticmethod
    def _starts(encoding: Any) -> npt.NDArray[np.int64]:
        return np.array([start for start, _ in encoding.offsets], np.int64)

    def _render(
        self, messages: Sequence[Message], where: str, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _rendering:
                rendered: Any = render_jinja_template(
                    conversations=[list(messages)],
                    chat_template=self._template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=marks,
                    **self._variables,
                )
        except Exception as error:  # whatever the template raises
            raise UserError(f"{where}: {self.name} fails: {_line(error)}") from None
        texts, spans = rendered
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if marks else []


def _before(added: str, content: str) -> int:
    """Where the content begins in what a turn added to the text; past its end if it is not there."""
    words = content.strip()
    place = added.find(words)
    if place < 0:
        return len(added)
    return place if added[:place].strip() else 0


def _settings(folder: Path) -> Any:
    """What transformers knows of the tokenizer: its template and the names of its special tokens."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("chat data needs transformers: pip install 'megatron-zebra[hf]'") from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, from many files
        raise UserError(f"{folder}: transformers cannot read this tokenizer ({_line(error)})") from None


def _template(settings: Any, folder: Path, file: Path | None) -> tuple[str, str]:
    """The template and how to name it."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8"), f"the chat template {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {file}: cannot be read ({_line(error)})") from None
    if settings.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template; give one with --chat-template FILE")
    try:
        return settings.get_chat_template(), f"the chat template of {folder}"
    except ValueError as error:  # several, and none of them the default
        raise UserError(f"{folder}: {_line(error)}; give one with --chat-template FILE") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
