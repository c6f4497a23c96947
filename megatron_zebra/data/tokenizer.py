"""Tokenizers: SentencePiece ``.model`` and Hugging Face ``tokenizer.json`` behind one small interface."""

import hashlib
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from megatron_zebra.errors import UserError

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")  # in order of preference


class Tokenizer(Protocol):
    """Text to ids and back. Ids are 0 to ``vocab_size`` - 1; ``eod_id`` ends a document; ``hash`` is that of the file.

    Nothing is added to a text (no beginning-of-sequence token), and the names of special tokens in a text are text.
    ``prefix`` are the special tokens that the file's own rules would put before a text, ``special`` all that it has.
    """

    name: str
    kind: str
    hash: str
    vocab_size: int
    eod_id: int
    prefix: list[int]
    special: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def token_id(self, token: str) -> int | None:
        """The id of one token by name, None if it has none."""


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Open a tokenizer file, or the folder that holds one; UserError if it is none or has no end-of-document token.

    ``eod_token`` names that token; by default it is SentencePiece's eos, or the first of EOD_TOKENS that there is.
    """
    file = _find(Path(path))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if file.suffix == ".json" or (file.suffix != ".model" and data.lstrip()[:1] == b"{"):
        return HuggingFaceTokenizer(file, data, eod_token)
    return SentencePieceTokenizer(file, data, eod_token)


def check_ids(tokenizer: "Tokenizer", place: Path, vocab_size: int) -> None:
    """UserError if ``tokenizer``, which lies at ``place``, has ids that a model of ``vocab_size`` does not."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer {place}: has {tokenizer.vocab_size} tokens, the model {vocab_size}; is it the model's?"
        )


class SentencePieceTokenizer:
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes, eod_token: str | None = None) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
            self.vocab_size = self._model.GetPieceSize()
        except Exception:
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(
                f"{path}: not a tokenizer; allowed are SentencePiece .model and Hugging Face tokenizer.json files"
            )
        self.name, self.hash = path.name, hashlib.sha256(data).hexdigest()
        self.prefix: list[int] = []  # whether there is one is not in such a file
        self.special = frozenset(filter(self._model.IsControl, range(self.vocab_size)))
        eos = self._model.eos_id() if eod_token is None and self._model.eos_id() >= 0 else None
        self.eod_id = _find_eod(self, path, eod_token) if eos is None else eos

    def encode(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._model.EncodeAsIds(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than there are pieces; the others are no text, as in a tokenizer.json.
        return self._model.DecodeIds([int(number) for number in ids if number < self.vocab_size])

    def token_id(self, token: str) -> int | None:
        number = self._model.PieceToId(token)
        return number if self._model.IdToPiece(number) == token else None


class HuggingFaceTokenizer:
    """A tokenizer.json, read by ``tokenizers``; truncation, padding and post-processing in it are not applied."""

    kind = "huggingface"

    def __init__(self, path: Path, data: bytes, eod_token: str | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # documents are spread over processes instead
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: not a tokenizer.json of Hugging Face's tokenizers ({reason})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path}: a tokenizer without any token")
        self.vocab_size = max(vocabulary.values()) + 1
        self.name, self.hash = path.name, hashlib.sha256(data).hexdigest()
        self.eod_id = _find_eod(self, path, eod_token)
        added = self._model.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)
        told = self._model.encode("a", add_special_tokens=True)
        self.prefix = [number for number, _ in takewhile(lambda pair: pair[1], zip(told.ids, told.special_tokens_mask))]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(number) for number in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: a folder without tokenizer.json or tokenizer.model")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a tokenizer is a SentencePiece .model or a Hugging Face tokenizer.json")
    return path


def _find_eod(tokenizer: Tokenizer, path: Path, eod_token: str | None) -> int:
    for token in EOD_TOKENS if eod_token is None else (eod_token,):
        number = tokenizer.token_id(token)
        if number is not None:
            return number
    wanted = f"no token {eod_token!r}" if eod_token is not None else f"none of {', '.join(EOD_TOKENS)}"
    raise UserError(f"{path}: {wanted} in the vocabulary; name the token that ends a document with --eod-token")
