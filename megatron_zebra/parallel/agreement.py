"""All ranks must have been started with the same configuration; found before any collective could hang over it."""

import datetime
import hashlib
import json
import platform
import re
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_zebra.errors import UserError

_PLACES = re.compile(r"data\.(cache_dir|.*\.prefix)")  # each node may keep its own copy; the fingerprint is compared
_KEYS = "megatron_zebra/agreement"
_NAMED = 8  # ranks that a line names at most


def facts(sections: Mapping[str, Any]) -> dict[str, str]:
    """``sections`` (nested) as flat ``section.key`` -> value, without what may differ from node to node."""
    flat: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                add(f"{name}[{i}]", item)
        elif not _PLACES.fullmatch(name):
            flat[name] = str(value)

    add("", sections)
    return flat


def agree(store: dist.Store, rank: int, size: int, own: Mapping[str, str], timeout: float) -> None:
    """Return once all ranks have come with the same ``own`` facts and the same versions of python and torch.

    Each rank leaves its facts and their hash in ``store``; rank 0 compares the hashes and publishes what it found. The store
    holds a few KB a rank, and only rank 0 reads more than one key.

    Args:
        timeout: seconds to wait for ranks that have not come.

    Raises:
        UserError: on every rank; a rank has not come or differs from rank 0. Names which, and the first key that differs.
    """
    own = {**own, "version of torch": torch.__version__, "version of python": platform.python_version()}
    text = json.dumps(own)
    store.set(f"{_KEYS}/facts/{rank}", text)
    store.set(f"{_KEYS}/hash/{rank}", _hash(own))
    if rank == 0:
        store.set(f"{_KEYS}/found", _compare(store, size, own, timeout))
    # Rank 0 may have come later than this one, and waits as long as this one did.
    store.wait([f"{_KEYS}/found"], datetime.timedelta(seconds=2 * timeout))
    if found := store.get(f"{_KEYS}/found").decode():
        raise UserError(found, mine=rank == 0)


def _hash(own: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _compare(store: dist.Store, size: int, own: Mapping[str, str], timeout: float) -> str:
    """What is wrong, in one line; empty if nothing is."""
    keys = [f"{_KEYS}/hash/{rank}" for rank in range(size)]
    until = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > until:
            missing = [rank for rank in range(size) if not store.check([keys[rank]])]
            return f"{_ranks(missing)} of {size} did not come within parallel.timeout = {timeout:g} seconds"
        time.sleep(0.02)
    hashes = store.multi_get(keys)
    others = [rank for rank in range(size) if hashes[rank] != hashes[0]]
    if not others:
        return ""
    theirs = json.loads(store.get(f"{_KEYS}/facts/{others[0]}"))
    different = [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]
    more = f" (and {len(different) - 1} more keys differ)" if len(different) > 1 else ""
    return (
        f"the ranks were started with different configurations: {_ranks(others)} of {size} not as rank 0: {different[0]} = "
        f"{theirs.get(different[0], 'not there')} on rank {others[0]}, {own.get(different[0], 'not there')} on rank 0{more}"
    )


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:_NAMED]))
    return f"rank{'s' * (len(ranks) > 1)} {names}" + (f" and {len(ranks) - _NAMED} more" if ranks[_NAMED:] else "")
