"""The list of all keys, and the help that is printed from it."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_zebra.config.sections import Config


@dataclass(frozen=True)
class Key:
    """One key as the user writes it."""

    path: str
    description: str
    kind: str
    default: str
    unit: str
    allowed: str


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below ``section``, in order; keys of the items of a list are written ``list[].key``."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner = _section_of(field.annotation)
        if inner is not None and not _is_list(field.annotation):
            if field.default is None:
                yield _key(path, field)
            yield from all_keys(inner, path + ".")
        else:
            yield _key(path, field)
            if inner is not None:
                yield from all_keys(inner, path + "[].")


USAGE = """\
usage: pretrain_zebra.py [--config FILE] [--section.key VALUE ...] [--dry-run [--world-size N]]
       torchrun --nproc-per-node N pretrain_zebra.py --config FILE [--section.key VALUE ...]

Trains a Zebra: a Llama-like decoder in which the first of every L layers attends to
everything and the others to a window. Values come from the defaults below, then from
FILE, then from the command line; values are YAML (true, null, [1, 2], 1e-4).

  --dry-run        check everything, print the resolved configuration, the layer stripes,
                   parameters, memory and FLOPs of a step, and stop
  --world-size N   processes to plan for in a dry run (default: 1)
  --help           this text

A run folder that holds a checkpoint is resumed exactly: run the same command again.

examples:
  torchrun --nproc-per-node 2 pretrain_zebra.py --config launch/recipes/debug.yaml --training.steps 10
  python pretrain_zebra.py --config launch/recipes/debug.yaml --dry-run --world-size 8
"""


def help_text(width: int = 110) -> str:
    """The whole of ``--help``."""
    lines = [USAGE]
    for name, field in Config.model_fields.items():
        section = _section_of(field.annotation)
        lines.append(f"{name}: {(section.__doc__ or '').strip()}" if section else f"{name}:")
        items = all_keys(section, name + ".") if section else [_key(name, field)]
        for item in items:
            facts = [f"default {item.default}"] if item.default else ["required"]
            facts += [f"in {item.unit}"] if item.unit else []
            facts += [f"allowed: {item.allowed}"] if item.allowed else []
            lines.append(f"  --{item.path}  <{item.kind}>")
            body = f"{item.description} [{'; '.join(facts)}]"
            lines.append(textwrap.fill(body, width, initial_indent="      ", subsequent_indent="      "))
        lines.append("")
    return "\n".join(lines)


def _key(path: str, field: FieldInfo) -> Key:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Key(
        path,
        field.description or "",
        _kind(field.annotation),
        _default(field),
        str(extra.get("unit", "")),
        _allowed(field),
    )


def _strip(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _section_of(annotation: Any) -> type[BaseModel] | None:
    annotation = _strip(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, UnionType):
        return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
    return None


def _is_list(annotation: Any) -> bool:
    return get_origin(_strip(annotation)) is list


def _kind(annotation: Any) -> str:
    annotation = _strip(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is type(None) else _kind(arg) for arg in args)
    if origin is list:
        return f"list of {_kind(args[0])}"
    if origin is Literal:
        return "integer" if isinstance(args[0], int) else "word"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _literals(annotation: Any) -> list[Any]:
    annotation = _strip(annotation)
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for arg in get_args(annotation) for value in _literals(arg)]


def _allowed(field: FieldInfo) -> str:
    words = _literals(field.annotation)
    if words:
        return ", ".join(str(word) for word in words)
    limits = []
    for item in field.metadata:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if (value := getattr(item, name, None)) is not None:
                limits.append(f"{sign} {value}")
        if (length := getattr(item, "min_length", None)) is not None and _is_list(field.annotation):
            limits.append(f"{length} values")
    return " and ".join(limits)
