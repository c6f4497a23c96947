"""config.json read key by key: defaults filled in, types checked, and at the end what nobody asked for. Pure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_zebra.errors import UserError

LARGEST_CONFIG = 64 * 1024 * 1024  # bytes


class Values:
    """The keys of one config.json (or of one object within it, ``prefix``)."""

    def __init__(self, file: Path, raw: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> None:
        self.file, self.raw, self.defaults, self.prefix = file, raw, defaults, prefix
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str) -> Any:
        """The value as it stands, or the default; None where there is neither."""
        self.read.add(key)
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.error(key, f"a whole number from {least} is needed")
        return value

    def number(self, key: str, above: float = 0.0) -> float:
        """A finite number greater than ``above``."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < 1e30:
            raise self.error(key, f"a number above {above:g} is needed")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false is needed")
        return value

    def entries(self, key: str, length: int) -> list[Any]:
        """A list with one entry a layer (longer ones are cut)."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) < length:
            raise self.error(key, f"a list with an entry for each of the {length} layers is needed")
        return value[:length]

    def error(self, key: str, why: str) -> UserError:
        """What is wrong with ``key``, in one line."""
        shown = "missing" if key not in self.raw and key not in self.defaults else repr(self.get(key))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return UserError(f"{self.file}: {self.prefix}{key} is {shown}; {why}")

    def unread(self, known: frozenset[str]) -> list[str]:
        """Keys with a value that nobody asked for and that are not ``known`` to mean nothing here."""
        keys = [key for key in self.raw if key not in self.read and key not in known and self.raw[key] is not None]
        return [self.prefix + key for key in sorted(keys)]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object out of a small file; UserError in one line otherwise."""
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise UserError(f"{file}: larger than {LARGEST_CONFIG:,} bytes, so not what its name says")
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: a JSON object was expected")
    return document
