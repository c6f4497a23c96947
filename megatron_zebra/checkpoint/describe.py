"""What a checkpoint holds, and whether it is of the model at hand."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint.reader import open_checkpoint


def describe(folder: Path | str) -> dict[str, Any]:
    """Step, metadata, counts: ``tensors`` and ``parameters`` (elements of the weights), ``bytes``, and the same per kind.

    ``shapes`` maps each weight's name to [global shape, type].
    """
    checkpoint = open_checkpoint(folder)
    kinds: dict[str, dict[str, int]] = {}
    for (name, kind), shape in checkpoint.tensors().items():
        entry = kinds.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += prod(shape)
        entry["bytes"] += sum(piece.byte_length for piece in checkpoint.pieces(name, kind))
    weights = kinds.get("weight", {"tensors": 0, "elements": 0})
    return {
        "folder": str(folder),
        "step": checkpoint.step,
        "written_by_ranks": checkpoint.world_size,
        "tensors": weights["tensors"],
        "parameters": weights["elements"],
        "bytes": sum(entry["bytes"] for entry in kinds.values()),
        "kinds": kinds,
        "shapes": {name: [list(checkpoint.shape(name)), checkpoint.dtype(name)] for name in checkpoint.names()},
        "metadata": checkpoint.metadata,
    }


def compare_model(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Each key whose value differs: "hidden_size: 64 in the checkpoint, 128 wanted". Nested keys are joined with dots.

    Tuples equal lists: JSON knows no tuples.
    """
    a, b = _flat(stored), _flat(wanted)
    missing = object()

    def show(value: Any) -> str:
        return "nothing" if value is missing else repr(value)

    return [
        f"{key}: {show(a.get(key, missing))} in the checkpoint, {show(b.get(key, missing))} wanted"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
