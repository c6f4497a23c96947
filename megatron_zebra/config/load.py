"""Defaults < YAML file < command line, checked key by key; every mistake is one line."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_zebra.config.help import Key, all_keys
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and a key written twice is an error."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would read as a number."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
        list("-+.0123456789"),
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key_node)
        if not isinstance(name, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is not a name", key_node.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{name}' is written twice", key_node.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if "\0" in text:
        raise yaml.constructor.ConstructorError(None, None, "text with a NUL in it", node.start_mark)
    return text


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _text)

MOST_RANKS = 1 << 20  # that a dry run lists
MOST_BYTES = 1 << 20  # of a configuration, and of its values once aliases are written out


@dataclass(frozen=True)
class CommandLine:
    """What the words of a command line say."""

    config: str | None
    overrides: dict[str, Any]
    dry_run: bool
    world_size: int | None
    help: bool


def parse_words(words: Sequence[str]) -> CommandLine:
    """Split ``words`` into the few options and the ``--section.key value`` overrides (values are YAML)."""
    config, dry_run, world_size, wants_help = None, False, None, False
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        option, equals, inline = word.partition("=")
        if option in ("--help", "-h"):
            wants_help = True
        elif word == "--dry-run":
            dry_run = True
        elif not option.startswith("--") or not all(option[2:].split(".")) or option == "--dry-run":
            raise UserError(
                f"'{_printable(word)}' is not an option; write --section.key value, --config FILE, --dry-run, --world-size N or --help"
            )
        else:
            value = inline if equals else next(rest, None)
            if value is None or (not equals and value.startswith("--")):
                raise UserError(f"{_printable(option)} has no value")
            if option == "--config":
                config = value
            elif option == "--world-size":
                if not re.fullmatch("[0-9]{1,7}", value) or not 1 <= int(value) <= MOST_RANKS:
                    raise UserError(f"--world-size {_printable(value)}: must be a whole number from 1 to {MOST_RANKS}")
                world_size = int(value)
            else:
                overrides[option[2:]] = _yaml(value, f"{option} {value}")
    return CommandLine(config, overrides, dry_run, world_size, wants_help)


def load_config(file: str | Path | None, overrides: dict[str, Any]) -> Config:
    """Read and check each key on its own (``check.problems`` looks across sections).

    Raises:
        UserError: one line for each wrong key or value.
    """
    tree = _read(Path(file)) if file is not None else {}
    for path, value in overrides.items():
        _assign(tree, path, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\nerror: ".join(_lines(error, tree))) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration as a YAML file that ``load_config`` reads back equal."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {file}: is not UTF-8 text") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"--config {file}: is larger than {MOST_BYTES >> 20} MiB, and so no configuration")
    tree = _yaml(text, str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {file}: must be a mapping of sections, not {type(tree).__name__}")
    return {name: {} if section is None else section for name, section in tree.items()}


def _yaml(text: str, where: str) -> Any:
    """The value of ``text``; ``where`` stands before what is wrong with it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_BYTES:
            raise yaml.MarkedYAMLError(problem="its aliases stand for more than a configuration can hold")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        if problem.startswith("but "):
            problem = f"{getattr(error, 'context', '')}, {problem}"
        raise UserError(f"{_printable(where)}{line}: {problem}") from None
    except (ValueError, RecursionError) as error:
        # A date that does not exist, a number of thousands of digits; brackets a thousand deep.
        reason = "is nested too deeply" if isinstance(error, RecursionError) else "has a value that cannot be read"
        raise UserError(f"{_printable(where)}: {reason}") from None


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of ``node`` with its aliases written out (a few aliases of aliases can stand for terabytes)."""
    if isinstance(node, yaml.ScalarNode):
        return len(node.value) + 1
    if id(node) not in known:
        known[id(node)] = 0  # what holds itself is refused by the constructor
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"--{_printable(path)}: {'.'.join(parents[: depth + 1])} is not a section")
        node = child
    node[last] = value


def _lines(error: ValidationError, tree: dict[str, Any]) -> Iterator[str]:
    keys = {item.path: item for item in all_keys()}
    for problem in error.errors():
        parts = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in parts).lstrip(".")
        if problem["type"] == "extra_forbidden":
            yield f"{path}: no such key{_suggestion(path, parts)}"
        elif problem["type"] == "missing":
            yield f"{path}: is missing"
        else:
            declared = keys.get(re.sub(r"\[\d+\]", "[]", path)) or keys.get(re.sub(r"\[\d+\].*", "", path))
            allowed = f" (allowed: {declared.allowed})" if declared and declared.allowed else ""
            yield f"{path} = {_short(problem['input'])}: {_reason(problem)}{allowed}"


def _reason(problem: Any) -> str:
    kind, limits = problem["type"], problem.get("ctx", {})
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a section: key: value pairs"
    if kind in ("too_short", "too_long"):
        return f"must have {'at least' if kind == 'too_short' else 'at most'} {limits.get('min_length', limits.get('max_length'))} values"
    if kind == "string_too_short":
        return "must not be empty"
    text = problem["msg"].removeprefix("Input should ").removeprefix("Value error, ")
    return ("must " + text) if text.startswith(("be ", "have ")) else text


def _short(value: Any) -> str:
    text = "null" if value is None else str(value) if not isinstance(value, str) else repr(value)
    return _printable({"True": "true", "False": "false"}.get(text, text))


def _printable(text: str) -> str:
    """``text`` on one line of a terminal."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
    return text if len(text) <= 80 else text[:77] + "..."


def _suggestion(path: str, parts: list[Any]) -> str:
    section: Any = Config
    for part in parts[:-1]:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = field.annotation if field else None
    here = list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
    if beside := difflib.get_close_matches(str(parts[-1]), here, 1, 0.75):
        return f"; perhaps {path.removesuffix(str(parts[-1]))}{beside[0]}"
    everything = [item.path for item in all_keys()]
    near = difflib.get_close_matches(path, everything, 1, 0.75)
    if not near:
        near = [full for full in everything if full.rsplit(".", 1)[-1] == parts[-1]][:1]
    if near:
        return f"; perhaps {near[0]}"
    return f"; allowed here: {', '.join(here)}" if here else ""


__all__ = ["CommandLine", "Key", "load_config", "parse_words", "to_yaml"]
