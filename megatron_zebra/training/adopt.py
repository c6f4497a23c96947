"""A run that begins from a model: what the configuration leaves open is the model's, what it gives is compared with it.

Imports no torch.
"""

from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint import catalog, layout
from megatron_zebra.config import check
from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.sections import Config, Model, Rope
from megatron_zebra.convert.folder import architecture_of, form_of, stored_architecture
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture, resolve

FIXED = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_eps",
)
"""Keys of ``model`` that must be the loaded model's; the rest of what decides the function may become another."""

_HAS = "the loaded model has"


def adopted(config: Config, run: Path) -> Config:
    """``config`` with the model that it begins from (``checkpoint.load``) in place of keys that it leaves open.

    A run that has checkpoints of its own goes on with their model, so that the one it began from may be gone.

    Args:
        run: the run's folder.

    Raises:
        UserError: a line for each given key that the model contradicts; there is no such model.
    """
    if config.checkpoint.load is None:
        return config
    load = Path(config.checkpoint.load)
    own = _of_run(run)
    source = own or _named("checkpoint.load", load)
    model, wrong = adopt(config.model, source, longest_sequence(config))
    if wrong:
        raise UserError("\nerror: ".join(f"{line}, as the model of checkpoint.load = {load} has" for line in wrong))
    config = config.model_copy(update={"model": model})
    if own is None and goes_on(config) and (lines := changes(config, source)):
        raise UserError(
            "\nerror: ".join(
                f"{line}: a run that changes it begins with checkpoint.load_part = weights, not all" for line in lines
            )
        )
    return config


def adopt(model: Model, source: Architecture, longest: int) -> tuple[Model, list[str]]:
    """``model`` with what it leaves open taken from ``source``, and a line for each key that must not be another.

    A null of FIXED counts as left open. ``rope`` and ``rope_local`` given in part keep the rest of the source's.

    Args:
        longest: tokens of the longest row of the run.
    """
    given = {name for name in model.model_fields_set if getattr(model, name) is not None or name == "rope_local"}
    values: dict[str, Any] = {name: getattr(source, name) for name in FIXED}
    wrong = [
        f"model.{name} = {_plain(getattr(model, name))}: must be {_plain(values[name])}"
        for name in FIXED
        if name in given and getattr(model, name) != values[name]
    ]
    if not given & {"layer_kinds", "layer_group_size"}:
        values["layer_kinds"] = list(source.layer_kinds)
    if "window_size" not in given and "local" in source.layer_kinds:
        values["window_size"] = source.window_size
    if "nope_layers" not in given:
        values["nope_layers"] = list(source.nope_layers)
    values["rope"] = merged_rope(model.rope if "rope" in given else None, source, "global")
    if "rope_local" not in given:
        values["rope_local"] = source.rope["local"] if source.rope["local"] != source.rope["global"] else None
    elif model.rope_local is not None:
        values["rope_local"] = merged_rope(model.rope_local, source, "local")
    values["max_length"] = model.max_length or max(longest, source.max_length or 0)
    return model.model_copy(update=values), wrong


def merged_rope(given: Rope | None, source: Architecture, kind: Any) -> Rope:
    """The keys that ``given`` sets, over the source's RoPE of ``kind``.

    Another scaling begins from theta and the original length alone; that length, where nobody says it, is what the source
    is meant for.
    """
    theirs = source.rope[kind]
    asked = {name: getattr(given, name) for name in given.model_fields_set} if given is not None else {}
    kept = theirs.model_dump()
    if asked.get("scaling", theirs.scaling) != theirs.scaling:
        kept = {"theta": theirs.theta, "original_length": theirs.original_length}
    values = kept | asked
    if values.get("scaling") not in check.COUNTS_FROM_ORIGINAL:
        values["original_length"] = asked.get("original_length")
    elif values.get("original_length") is None:
        values["original_length"] = source.max_length
    return Rope(**values)


def notes(config: Config, run: Path) -> list[str]:
    """What the dry run and a new run's log say of the model that the adopted ``config`` begins from: a line each.

    Nothing of a run that has checkpoints of its own.
    """
    if config.checkpoint.load is None or _of_run(run) is not None:
        return []
    load = Path(config.checkpoint.load)
    found = changes(config, source := _named("checkpoint.load", load))
    if config.model.max_length != source.max_length:
        found.append(f"max_length: {config.model.max_length}, {_HAS} {_plain(source.max_length)}")
    if config.checkpoint.load_part == "all" and not goes_on(config):
        found.append(f"{load} has no moments: its weights alone are loaded, as with checkpoint.load_part = weights")
    return found


def changes(config: Config, source: Architecture) -> list[str]:
    """A line for each thing that the adopted ``config`` computes otherwise than ``source``."""
    arch = resolve(config.model, source.vocab_size, longest_sequence(config))
    found, has = [], _HAS
    if arch.layer_kinds != source.layer_kinds:
        found.append(f"layers: {_letters(arch)}, {has} {_letters(source)} (G global, l local)")
    windows = [a.window_size if "local" in a.layer_kinds else None for a in (arch, source)]
    if windows[0] != windows[1]:
        found.append(f"window_size: {windows[0] or 'none'}, {has} {windows[1] or 'none'}")
    for kind in arch.rope:
        ours, theirs = (a.rope[kind].model_dump() for a in (arch, source))
        other = [name for name in ours if ours[name] != theirs[name]]
        if other and kind in arch.layer_kinds:
            said = [", ".join(f"{name} {_plain(rope[name])}" for name in other) for rope in (ours, theirs)]
            found.append(f"rope of {kind} layers: {said[0]}; {has} {said[1]}")
    if arch.nope_layers != source.nope_layers:
        found.append(f"nope_layers: {list(arch.nope_layers)}, {has} {list(source.nope_layers)}")
    return found


def goes_on(config: Config) -> bool:
    """Whether ``checkpoint.load`` brings moments, step and data order too, as only a checkpoint of a run has them."""
    load = Path(config.checkpoint.load or "")
    return config.checkpoint.load_part == "all" and form_of(load) == "checkpoint" and has_progress(load)


def has_progress(path: Path) -> bool:
    """Whether a checkpoint says how far its run was; one that holds a converted model does not."""
    folder = path if (path / layout.INDEX).is_file() else catalog.newest(path / "checkpoints") or catalog.newest(path)
    return folder is not None and bool(layout.read_index(folder).metadata.get("progress"))


def teacher_of(config: Config) -> Architecture | None:
    """The teacher's architecture, if there is one.

    Raises:
        UserError: it is no model, has another vocabulary, or cannot be divided as the run is.
    """
    if config.training.distill.teacher is None:
        return None
    key = "training.distill.teacher"
    teacher = _named(key, Path(config.training.distill.teacher))
    if teacher.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{key} = {config.training.distill.teacher}: has a vocabulary of {teacher.vocab_size}, must have the model's "
            f"(model.vocab_size = {config.model.vocab_size})"
        )
    taught = config.model_copy(update={"model": adopt(Model(), teacher, longest_sequence(config))[0]})
    if lines := check.divisions(taught):
        raise UserError("\nerror: ".join(f"{key} = {config.training.distill.teacher}: {line}" for line in lines))
    return teacher


def _of_run(run: Path) -> Architecture | None:
    """The model of the newest checkpoint of a run whose index can be read."""
    for entry in reversed(catalog.entries(run / "checkpoints")):
        if entry.complete:
            try:
                return stored_architecture(layout.read_index(entry.folder).metadata, entry.folder)
            except UserError:
                continue  # damaged: told when the run resumes
    return None


def _named(key: str, path: Path) -> Architecture:
    try:
        return architecture_of(path)
    except UserError as error:
        raise UserError(f"{key} = {path}: {str(error).removeprefix(f'{path}: ')}") from None


def _letters(arch: Architecture) -> str:
    return "".join("G" if kind == "global" else "l" for kind in arch.layer_kinds)


def _plain(value: Any) -> str:
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), f"{value}")
