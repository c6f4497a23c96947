"""Why a run ends, said once: the first rank to publish a verdict in the group's store is believed by all."""

import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

_KEY, _NONE = "megatron_zebra/watch/verdict", "none"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: ``text`` about ``rank`` (None: about no rank). An empty text was told already."""

    rank: int | None
    text: str
    code: int


def publish(store: dist.Store, verdict: Verdict) -> Verdict:
    """Make ``verdict`` the one that counts, if there is none yet; returns the one that counts."""
    store.compare_set(_KEY, "", _NONE)
    return _decoded(store.compare_set(_KEY, _NONE, json.dumps(asdict(verdict))))


def published(store: dist.Store) -> Verdict | None:
    """The verdict that counts, if there is one."""
    word = store.compare_set(_KEY, "", _NONE)
    return None if word == _NONE.encode() else _decoded(word)


def _decoded(word: bytes) -> Verdict:
    return Verdict(**json.loads(word))
