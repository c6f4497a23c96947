"""A model to a Hugging Face folder that stock programs load: weights, configuration, tokenizer."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_zebra.convert import kept
from megatron_zebra.convert.hosts import choose, config_for
from megatron_zebra.convert.output import new_folder
from megatron_zebra.convert.safetensors import INDEX
from megatron_zebra.convert.shards import plan, split, write_shard
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.words import Words, find_words
from megatron_zebra.data.progress import Progress
from megatron_zebra.errors import UserError

MAX_SHARD_SIZE = 5 * 10**9


def to_hf(
    path: Path,
    output: Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    tokenizer: Path | None = None,
    max_length: int | None = None,
) -> list[str]:
    """Write the model at ``path`` into the folder ``output``.

    Args:
        form: a host of ``hosts.HOSTS``; None = the first that can express the model.
        dtype: of all weights, as torch names it; None = as stored.
        max_shard_size: bytes of a file's tensors (a single larger tensor has a file of its own).
        tokenizer: a folder of tokenizer files, or one file; None = what was kept of the model's origin.
        max_length: max_position_embeddings; None = the model's own.

    Returns:
        Notes for the user, a line each.
    """
    source = open_model(path)
    arch = source.architecture
    host = choose(arch, form)
    longest = max_length or arch.max_length
    if longest is None:
        raise UserError(f"{path}: does not say how long its sequences may be; give --max-length")
    origin = kept.origin_of(source.folder)
    words = find_words(tokenizer, origin, arch.vocab_size)
    ids, notes = _ids(origin, words, host)
    planned = plan(source, host, dtype)
    total = sum(tensor.bytes for tensor in planned)
    shards = split(planned, max_shard_size)
    sizes: Counter[str] = Counter()
    for tensor in planned:
        sizes[tensor.dtype] += tensor.bytes
    with new_folder(output, total) as folder:
        config = config_for(arch, host, longest) | {"dtype": sizes.most_common(1)[0][0]} | ids
        kept.write_json(folder / kept.CONFIG, config)
        if origin is None or tokenizer is not None or not kept.copy_files(origin, folder, (kept.GENERATION,)):
            kept.write_json(folder / kept.GENERATION, {key: value for key, value in ids.items() if value is not None})
        if origin is not None:
            kept.copy_files(origin, folder, kept.TERMS)
        if words is not None:
            words.write(folder)
        with Progress(f"writing {output.name}", total) as bar:
            for name, tensors in shards.items():
                write_shard(folder / name, tensors, source, bar)
        if len(shards) > 1:
            places = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
            kept.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return source.notes + notes


def _ids(origin: Path | None, words: Words | None, host: str) -> tuple[dict[str, Any], list[str]]:
    """The special ids of config.json, and notes on what is not known."""
    ids: dict[str, Any] = dict.fromkeys(kept.IDS)
    ids |= (words.ids if words is not None else {}) | (kept.special_ids(origin) if origin is not None else {})
    if words is not None and words.chosen:
        ids |= words.ids
    notes = [] if words is not None else ["the folder has no tokenizer; give --tokenizer to add one"]
    if ids["eos_token_id"] is None:
        notes.append("eos_token_id is not known, so generation does not stop by itself")
    if host == "cwm":
        # Its class has defaults of its own for what is left open: ids of another tokenizer.
        ids["eos_token_id"] = -1 if ids["eos_token_id"] is None else ids["eos_token_id"]
        ids["bos_token_id"] = 0 if ids["bos_token_id"] is None else ids["bos_token_id"]
    return ids, notes
