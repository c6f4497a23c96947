"""From a path to a model that answers."""

from pathlib import Path

import torch

from megatron_zebra.convert.kept import end_ids, origin_of
from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import ModelSource, open_model
from megatron_zebra.data.tokenizer import Tokenizer, check_ids, load_tokenizer
from megatron_zebra.errors import UserError
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.group import Group
from megatron_zebra.parallel.process import pick_device


def load(path: str | Path, device: str = "auto", precision: str | None = None) -> LanguageModel:
    """The model of a training checkpoint, a run folder, a Hugging Face folder or a GGUF file, on one device.

    Args:
        device: auto, cpu or cuda.
        precision: fp32 or bf16; None = bf16 on a GPU, fp32 on a CPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device}: must be auto, cpu or cuda")
    return language_model(open_model(Path(path)), pick_device(device, 0, "device"), precision)


def language_model(
    source: ModelSource, device: torch.device, precision: str | None, tp: Group | None = None
) -> LanguageModel:
    """``source`` on ``device``, divided over ``tp``."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision is not None and precision not in precisions:
        raise UserError(f"precision {precision}: must be fp32 or bf16")
    dtype = precisions[precision or ("bf16" if device.type == "cuda" else "fp32")]
    return LanguageModel(source.architecture, load_decoder(source, device, dtype, tp=tp), tp)


def check_tp(arch: Architecture, tp: int, given: str) -> None:
    """UserError that begins with ``given`` if ``tp`` ranks cannot divide the layers."""
    heads, kv, ffn = arch.num_heads, arch.num_kv_heads, arch.ffn_hidden_size
    if heads % tp or ffn % tp or (kv % tp and tp % kv):
        raise UserError(
            f"{given}: must divide the model's {heads} heads and {ffn} columns of the MLP, and divide its {kv} KV heads or be "
            "a multiple of them"
        )


def tokenizer_of(source: ModelSource, given: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer ``given``, or the one that came with the model; and where it is."""
    beside = source.folder if source.folder.is_dir() else source.folder.parent  # of a GGUF file
    place = given or origin_of(source.folder) or beside
    try:
        tokenizer = load_tokenizer(place)
    except UserError as error:
        raise (
            error if given else UserError(f"--tokenizer: must be given, since none is beside the model ({error})")
        ) from None
    check_ids(tokenizer, place, source.architecture.vocab_size)
    return tokenizer, place


def stop_ids(source: ModelSource, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a text: those that the model's files name, and the tokenizer's end of document."""
    folder = origin_of(source.folder)
    return {tokenizer.eod_id, *(end_ids(folder) if folder is not None else ())}
