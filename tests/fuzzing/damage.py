"""Damage: bytes, and trees of JSON or YAML. Everything follows from the Random that is handed in."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any


class Raw(str):
    """A JSON value as it is spelled."""


class Pairs(list[tuple[Any, Any]]):
    """An object in which a key may occur twice."""


WHOLE = [0, 1, 2, 3, 7, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64, 10**30]
NUMBERS = [*WHOLE, *(-n for n in WHOLE[1:]), 0.5, -0.0, 1e-320, 1e308]
TEXTS = [
    "", " ", "x", "1", "-1", "1e3", "true", "null", "\0", "a\nb", "\x1b[31m", "é\u202e漢\U0001f993", "../../x", "/proc/x",
    "%s{}", "a" * 10_000, "weight", "float32", "global", "local",
]  # fmt: skip
SPELLED = [
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("-1e400"), Raw("9" * 4000), Raw("9" * 5000),
    Raw('"\\ud800"'), Raw("[" * 300 + "]" * 300), Raw("[" * 100_000), Raw('{"a":' * 3000 + "1" + "}" * 3000),
]  # fmt: skip
TREES: list[Any] = [None, True, False, [], {}, [[]], [None], [0] * 1000, ["x", 1], {"a": 1}, {"": {}}, [[1, 2], [3, 4]]]


def odd_value(chance: random.Random, spelled: bool = True) -> Any:
    """A value that somebody did not think of."""
    pools: list[list[Any]] = [NUMBERS, TEXTS, TREES, *([SPELLED] if spelled else [])]
    return copy.deepcopy(chance.choice(chance.choice(pools)))


def few(chance: random.Random) -> int:
    """How many damages an input gets."""
    return chance.choice((1, 1, 1, 2, 2, 5))


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """``data`` with a few bits turned, bytes lost, doubled, swapped, put in, or numbers written over."""
    changed = bytearray(data)
    for _ in range(few(chance)):
        chance.choice(_ON_BYTES)(chance, changed)
    return bytes(changed)


def _turn(chance: random.Random, data: bytearray) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, data: bytearray) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice((0, 10, 34, 44, 58, 91, 93, 123, 125, 127, 128, 255))


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _lose(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    del data[at : at + chance.choice((1, 2, 4, 8, 40, 1000))]


def _double(chance: random.Random, data: bytearray) -> None:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 4, 8, 60, 5000))
    data[at:at] = data[at : at + size]


def _swap(chance: random.Random, data: bytearray) -> None:
    size = chance.choice((1, 4, 8, 30))
    if len(data) > 2 * size:
        a, b = sorted(chance.randrange(len(data) - size) for _ in range(2))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _put(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    random_bytes = chance.randbytes(chance.choice((1, 8, 64)))
    data[at:at] = chance.choice(
        (b"\0" * 8, b"\xff" * 8, b"\xff\xfe", b"9" * 30, b'"', b"{}", b"[[", b"\n", random_bytes)
    )


def _number(chance: random.Random, data: bytearray) -> None:
    write_number(chance, data, chance.randrange(len(data) + 1), chance.choice(("<B", "<h", "<i", "<q")))


def write_number(chance: random.Random, data: bytearray, at: int, code: str) -> None:
    """Write an extreme number, or one near to what was there, at ``at``."""
    size = struct.calcsize(code)
    if at + size > len(data):
        return
    (old,) = struct.unpack_from(code, data, at)
    new = chance.choice((chance.choice(WHOLE), -chance.choice(WHOLE), old + 1, old - 1, -old, 2 * old, old + 8))
    data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


_ON_BYTES: list[Callable[[random.Random, bytearray], None]] = [
    _turn, _turn, _set, _cut, _lose, _double, _swap, _put, _number, _number
]  # fmt: skip


def damaged_tree(chance: random.Random, tree: Any, spelled: bool = True) -> Any:
    """A copy of ``tree`` with a few values replaced, lost, doubled, swapped, nested or renamed.

    Args:
        spelled: whether values may be ``Raw`` and objects ``Pairs``, which only ``to_json`` can write.
    """
    changed = [copy.deepcopy(tree)]  # so that the root is a value like all others
    for _ in range(few(chance)):
        places = [*_places(changed)]
        if places:
            chance.choice(_ON_TREES)(chance, *chance.choice(places), places, spelled)
    return changed[0]


Place = tuple[Any, Any]  # a list or dict, and the index or key of a value in it


def _places(node: Any) -> Iterator[Place]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if type(node) is list else ()
    for key, value in inside:
        yield node, key
        yield from _places(value)


def _replace(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    node[key] = odd_value(chance, spelled)


def _tweak(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    value = node[key]
    if isinstance(value, bool) or value is None:
        node[key] = chance.choice((not value, 0, 1, str(value)))
    elif isinstance(value, int | float):
        numbers = (value + 1, value - 1, -value, value * 2, float(value), bool(value), str(value), [value], value / 2)
        node[key] = chance.choice(numbers)
    elif isinstance(value, str) and not isinstance(value, Raw):
        texts = (value + "x", value[:-1], value.upper(), value[::-1], value * 50, value + "\n", [value], {value: value})
        node[key] = chance.choice(texts)
    elif type(value) is list:
        node[key] = chance.choice(
            (value[:-1], value * 2, value[::-1], value[:1] * 50, {str(i): v for i, v in enumerate(value)})
        )
    elif isinstance(value, dict):
        node[key] = chance.choice(([value], [*value.items()], [*value], {**value, "more": 1}))


def _delete(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    if (type(node) is list and len(places) and node is not places[0][0]) or isinstance(node, dict):
        del node[key]


def _twice(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    """The key of an object twice; an element of a list twice."""
    value = node[key]
    if spelled and isinstance(value, dict) and value:
        again = chance.choice([*value])
        node[key] = Pairs([*value.items(), (again, chance.choice((value[again], odd_value(chance))))])
    elif type(value) is list and value:
        value.insert(chance.randrange(len(value) + 1), copy.deepcopy(chance.choice(value)))


def _exchange(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    """Two values change places: of the same key where there are such, as the fields of two pieces."""
    same = [place for place in places if place[1] == key and place[0] is not node]
    other, there = chance.choice(same if same and chance.random() < 0.7 else places)
    a, b = copy.deepcopy(node[key]), copy.deepcopy(other[there])
    node[key], other[there] = b, a


def _nest(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    value = node[key]
    node[key] = chance.choice(([value], {str(key): value}, [[value]]))


def _rename(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    if isinstance(node, dict):
        names = (f"{key}x", str(key)[:-1], str(key).upper(), chance.choice(TEXTS))
        node[chance.choice(names)] = node.pop(key)


def _add(chance: random.Random, node: Any, key: Any, places: list[Place], spelled: bool) -> None:
    if isinstance(node[key], dict):
        node[key][chance.choice(TEXTS)] = odd_value(chance, spelled)


_ON_TREES: list[Callable[[random.Random, Any, Any, list[Place], bool], None]] = [
    _replace, _replace, _replace, _tweak, _tweak, _delete, _twice, _exchange, _nest, _rename, _add
]  # fmt: skip


def to_json(node: Any) -> bytes:
    """JSON that may be spelled wrongly or hold a key twice."""
    return _spell(node).encode("utf-8", "surrogatepass")


def _spell(node: Any) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, dict | Pairs):
        pairs = node.items() if isinstance(node, dict) else node
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_spell(value)}" for key, value in pairs) + "}"
    if isinstance(node, list | tuple):
        return "[" + ", ".join(map(_spell, node)) + "]"
    return json.dumps(node)
