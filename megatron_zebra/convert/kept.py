"""What is kept of a Hugging Face folder beside its weights: configuration, tokenizer and chat template, byte for byte."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint import files
from megatron_zebra.checkpoint.locate import run_of
from megatron_zebra.convert.values import read_json
from megatron_zebra.errors import UserError

KEPT = "huggingface"  # folder within a checkpoint or a run
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
TEMPLATES = "additional_chat_templates"  # a folder
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of ``names`` that ``source`` has, and its further chat templates; return what was copied."""
    found = [name for name in names if (source / name).is_file()]
    if TOKENIZER[0] in names and (source / TEMPLATES).is_dir():
        found += [f"{TEMPLATES}/{path.name}" for path in sorted((source / TEMPLATES).iterdir()) if path.is_file()]
    for name in found:
        with files.naming("writing", target / name):
            files.make_folder((target / name).parent)
            shutil.copyfile(source / name, target / name)
    return found


def kept_folder(checkpoint: Path) -> Path | None:
    """Where the files of the model's origin are: within the checkpoint, or within its run."""
    run = run_of(checkpoint) or checkpoint.parent
    return next((folder for folder in (checkpoint / KEPT, run / KEPT) if folder.is_dir()), None)


def origin_of(model: Path) -> Path | None:
    """The folder with the files beside a model's weights: a Hugging Face folder itself, or what a checkpoint keeps of one."""
    return model if (model / CONFIG).is_file() else kept_folder(model)


def tokenizer_hashes(model: Path) -> set[str]:
    """sha256 of each tokenizer beside the weights of a model, a checkpoint or a run; none of a file, such as GGUF."""
    folder = origin_of(model)
    found = [folder / name for name in ("tokenizer.json", "tokenizer.model")] if folder is not None else []
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in found if file.is_file()}


def keep(source: Path, run: Path) -> list[str]:
    """Copy into a run's folder what is kept of the model that it begins from; return what was copied."""
    origin = origin_of(source)
    return copy_files(origin, run / KEPT, (CONFIG, GENERATION, *TOKENIZER, *TERMS)) if origin is not None else []


def keep_tokenizer(tokenizer: Path, run: Path) -> None:
    """Copy a run's own tokenizer, a file or a folder, into its folder, unless one is kept there already."""
    target = run / KEPT
    if any((target / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    if tokenizer.is_dir():
        copy_files(tokenizer, target, TOKENIZER)
        return
    name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
    with files.naming("writing", target / name):
        files.make_folder(target)
        shutil.copyfile(tokenizer, target / name)


def special_ids(folder: Path) -> dict[str, Any]:
    """The ids of IDS that config.json or generation_config.json of ``folder`` give."""
    ids: dict[str, Any] = {}
    for name in (GENERATION, CONFIG):
        if (folder / name).is_file():
            said = read_json(folder / name)
            ids |= {key: said[key] for key in IDS if said.get(key) is not None}
    return ids


def end_ids(folder: Path) -> set[int]:
    """All tokens that config.json or generation_config.json of ``folder`` ends a text with: the two may name different ones."""
    named: set[int] = set()
    for name in (GENERATION, CONFIG):
        said: Any = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        named |= {number for number in (said if isinstance(said, list) else [said]) if type(number) is int}
    return named


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise UserError if a tokenizer in ``folder`` makes ids for which a model of ``vocab_size`` has no row."""
    for name, largest in _largest_ids(folder).items():
        if largest >= vocab_size:
            raise UserError(f"{folder / name}: has a token with id {largest}, but the embedding has {vocab_size} rows")


def _largest_ids(folder: Path) -> dict[str, int]:
    """The largest id of each tokenizer file."""
    found: dict[str, list[Any]] = {}
    if (folder / "tokenizer.json").is_file():
        document = read_json(folder / "tokenizer.json")
        model = document.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary or []) - 1]
        added = document.get("added_tokens") or []
        found["tokenizer.json"] = ids + [item.get("id") for item in added if isinstance(item, dict)]
    if (folder / "added_tokens.json").is_file():
        found["added_tokens.json"] = list(read_json(folder / "added_tokens.json").values())
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        found["tokenizer_config.json"] = [int(key) for key in added if str(key).isdecimal()]
    if (folder / "tokenizer.model").is_file():
        found["tokenizer.model"] = [_pieces(folder / "tokenizer.model") - 1]
    whole = {name: [i for i in ids if isinstance(i, int)] for name, ids in found.items()}
    return {name: max(ids) for name, ids in whole.items() if ids}


def _pieces(file: Path) -> int:
    """How many pieces a SentencePiece model has; 0 of another format under the same name."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(file.read_bytes())
        return model.GetPieceSize()
    except Exception:
        return 0


def write_json(file: Path, document: dict[str, Any]) -> None:
    """As transformers lays out its JSON."""
    with files.naming("writing", file):
        files.write_whole(file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
