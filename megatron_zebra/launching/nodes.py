"""What one node is, and what makes two nodes unfit to train together. Pure, but for ``this_node``."""

import hashlib
import platform
import re
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import megatron_zebra

PACKAGES = ("torch", "deepspeed", "flash-attn", "liger-kernel", "numpy")
NAMED = 8  # hosts that a line names at most
SLOW = 0.7  # of the median: a node below it is named


@dataclass(frozen=True)
class Node:
    """``facts``: what must be the same everywhere; ``processes``: of this run on the node; ``sees``: the run folder."""

    host: str
    facts: dict[str, str]
    gpus: int
    processes: int
    sees: bool


def this_node(gpus: Sequence[str], libraries: Mapping[str, str], sees: bool) -> Node:
    """This machine, its ``processes`` not counted yet.

    Args:
        gpus: the name of each.
        libraries: versions that only torch knows.
    """
    facts = {"python": platform.python_version(), "megatron-zebra": _sources()}
    facts |= {name: _version(name) for name in PACKAGES} | dict(libraries)
    facts |= {"NVIDIA driver": _driver(), "GPUs": _counted(gpus)}
    return Node(socket.gethostname(), facts, len(gpus), 0, sees)


def settled(found: Sequence[Node | None]) -> list[Node]:
    """The nodes out of ``found``, one for the first rank of each node and None for the others, in order of rank.

    Each with its number of processes; hosts of one name (containers may all have the same) with a number behind.
    """
    leading = [rank for rank, node in enumerate(found) if node is not None]
    nodes = [node for node in found if node is not None]
    hosts = [node.host for node in nodes]
    counts = [following - rank for rank, following in zip(leading, [*leading[1:], len(found)])]
    return [
        replace(
            node,
            host=f"{node.host}#{i}" if hosts.count(node.host) > 1 else node.host,
            facts={**node.facts, "processes": str(count)},
            processes=count,
        )
        for i, (node, count) in enumerate(zip(nodes, counts))
    ]


def problems(nodes: Sequence[Node], folder: Path, needs_gpus: bool) -> list[str]:
    """Why these nodes cannot train together, a line each; empty if they can.

    Args:
        folder: the run's, which all must see.
        needs_gpus: whether each process needs a GPU.
    """
    lines = []
    for fact in dict.fromkeys(name for node in nodes for name in node.facts):
        groups: dict[str, list[str]] = {}
        for node in nodes:
            groups.setdefault(node.facts.get(fact, "none"), []).append(node.host)
        if len(groups) > 1:
            rarest_first = sorted(groups.items(), key=lambda group: len(group[1]))
            lines.append(f"{fact} differs: " + "; ".join(f"{value} on {named(hosts)}" for value, hosts in rarest_first))
    if needs_gpus and (short := [node for node in nodes if node.gpus < node.processes]):
        have = ", ".join(sorted({f"{node.gpus} for {node.processes} processes" for node in short}))
        lines.append(f"GPUs are missing on {named(node.host for node in short)}: {have}")
    if blind := [node.host for node in nodes if not node.sees]:
        lines.append(
            f"logging.run_dir = {folder}: {named(blind)} cannot read there what {nodes[0].host} wrote; it must lie on storage that all nodes share"
        )
    return lines


def slow(figures: Mapping[str, float]) -> list[str]:
    """Hosts far below the median of ``figures`` (bytes a second of each host). Of one or two hosts it cannot be said."""
    if len(figures) < 3:
        return []
    middle = statistics.median(figures.values())
    return [host for host, figure in figures.items() if figure < SLOW * middle]


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of ``count`` nodes, in rounds in which no node has more than one."""
    if count < 2:
        return []
    if count == 2:
        return [[(0, 1)]]
    links = [(i, (i + 1) % count) for i in range(count)]
    even = count - count % 2
    return [links[0:even:2], links[1:even:2], *([links[even:]] if count % 2 else [])]


def named(hosts: Iterable[str]) -> str:
    """The first few, and how many more."""
    names = list(hosts)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")


def _counted(gpus: Sequence[str]) -> str:
    return ", ".join(f"{list(gpus).count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    """This package's version, and a hash of its sources: a checkout changes without its version."""
    root = Path(megatron_zebra.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{_version('megatron-zebra')} ({digest.hexdigest()[:12]})"


def _driver() -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"
