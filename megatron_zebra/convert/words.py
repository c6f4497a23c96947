"""The tokenizer that goes with an exported model: files as they are, and what transformers needs beside a bare one."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint import files
from megatron_zebra.convert import kept
from megatron_zebra.data.tokenizer import EOD_TOKENS, load_tokenizer
from megatron_zebra.errors import UserError

_SPECIAL = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Words:
    """A folder of tokenizer files, or one bare file. ``chosen``: by the user, so its ids go before the origin's.

    ``config`` is the tokenizer_config.json that a bare file needs.
    """

    path: Path
    ids: dict[str, Any]
    chosen: bool
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the tokenizer into ``folder``."""
        if self.path.is_dir():
            kept.copy_files(self.path, folder, kept.TOKENIZER)
            return
        bare = "tokenizer.json" if self.path.suffix == ".json" else "tokenizer.model"
        with files.naming("writing", folder / bare):
            shutil.copyfile(self.path, folder / bare)
        kept.write_json(folder / "tokenizer_config.json", self.config)
        if bare == "tokenizer.model":
            _add_json(folder)


def find_words(option: Path | None, origin: Path | None, vocab_size: int) -> Words | None:
    """The tokenizer of ``--tokenizer`` or else of the model's origin; None if there is none."""
    if option is not None and option.is_file():
        return _bare(option, vocab_size, True)
    folder = option or origin
    if folder is None or not any((folder / name).is_file() for name in kept.TOKENIZER):
        if option is not None:
            raise UserError(f"--tokenizer {option}: is no tokenizer file and no folder that holds one")
        return None
    there = [name for name in kept.TOKENIZER if (folder / name).is_file()]
    if len(there) == 1 and not (folder / kept.CONFIG).is_file():  # what a run keeps of a file as data.tokenizer
        return _bare(folder / there[0], vocab_size, option is not None)
    kept.check_tokenizer(folder, vocab_size)
    return Words(folder, kept.special_ids(folder), option is not None)


def _bare(file: Path, vocab_size: int, chosen: bool) -> Words:
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"--tokenizer {file}: has {tokenizer.vocab_size} tokens, the embedding has {vocab_size} rows")
    names = {key: token for key, token in _SPECIAL.items() if tokenizer.token_id(token) is not None}
    if end := [token for token in EOD_TOKENS if tokenizer.token_id(token) == tokenizer.eod_id]:
        names["eos_token"] = end[0]
    ids = {f"{key}_id": tokenizer.token_id(token) for key, token in names.items() if key != "unk_token"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    return Words(file, ids | {"eos_token_id": tokenizer.eod_id}, chosen, config)


def _add_json(folder: Path) -> None:
    """tokenizer.json beside a SentencePiece model, for versions of transformers that do not read the model themselves."""
    try:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    except ModuleNotFoundError:
        return
