"""What is said of nodes that are not alike, cannot see each other's files, or are slow."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_zebra.launching.nodes import Node, problems, rounds, settled, slow

FACTS = {"torch": "2.13.0", "NCCL": "2.28.3", "GPUs": "8 x H100"}
FOLDER = Path("/shared/run")


def node(host: str, **changes: object) -> Node:
    return replace(Node(host, FACTS, gpus=8, processes=8, sees=True), **changes)


def with_fact(host: str, name: str, value: str) -> Node:
    return node(host, facts=FACTS | {name: value})


def test_equal_nodes_are_fit() -> None:
    assert problems([node("a"), node("b")], FOLDER, needs_gpus=True) == []


def test_every_difference_is_named_by_host_the_rare_one_first() -> None:
    nodes = [node("a"), with_fact("b", "torch", "2.12.0"), with_fact("c", "NCCL", "2.27.5"), node("d")]
    assert problems(nodes, FOLDER, needs_gpus=True) == [
        "torch differs: 2.12.0 on b; 2.13.0 on a, c, d",
        "NCCL differs: 2.27.5 on c; 2.28.3 on a, b, d",
    ]


def test_a_fact_that_a_node_lacks_is_a_difference() -> None:
    nodes = [node("a"), node("b", facts={"torch": "2.13.0", "NCCL": "2.28.3"})]
    assert problems(nodes, FOLDER, needs_gpus=False) == ["GPUs differs: 8 x H100 on a; none on b"]


def test_of_many_hosts_a_few_are_named() -> None:
    nodes = [node(f"n{i}") for i in range(20)] + [with_fact("odd", "torch", "2.12.0")]
    assert problems(nodes, FOLDER, needs_gpus=True) == [
        "torch differs: 2.12.0 on odd; 2.13.0 on n0, n1, n2, n3, n4, n5, n6, n7 and 12 more"
    ]


@pytest.mark.parametrize(("needed", "lines"), [(True, ["GPUs are missing on b: 7 for 8 processes"]), (False, [])])
def test_fewer_gpus_than_processes(needed: bool, lines: list[str]) -> None:
    assert problems([node("a"), node("b", gpus=7)], FOLDER, needs_gpus=needed) == lines


def test_a_folder_that_is_not_shared() -> None:
    assert problems([node("a"), node("b", sees=False), node("c", sees=False)], FOLDER, needs_gpus=True) == [
        "logging.run_dir = /shared/run: b, c cannot read there what a wrote; it must lie on storage that all nodes share"
    ]


def test_nodes_of_a_list_of_ranks() -> None:
    """Processes are counted, equal names told apart, and unequal numbers of processes become a difference."""
    found = settled([node("x"), None, None, node("x"), None, node("y")])
    assert [(one.host, one.processes) for one in found] == [("x#0", 3), ("x#1", 2), ("y", 1)]
    assert problems(found, FOLDER, needs_gpus=True) == ["processes differs: 3 on x#0; 2 on x#1; 1 on y"]


def test_a_slow_node_is_named_where_it_can_be_told() -> None:
    assert slow({"a": 100.0, "b": 98.0, "c": 40.0, "d": 101.0}) == ["c"]
    assert slow({"a": 100.0, "b": 75.0, "c": 90.0}) == []
    assert slow({"a": 100.0, "b": 1.0}) == []


@pytest.mark.parametrize("count", range(1, 12))
def test_rounds_hold_every_link_of_the_ring_once(count: int) -> None:
    found = rounds(count)
    for links in found:
        ends = [end for link in links for end in link]
        assert len(ends) == len(set(ends)), "a node with two links in one round"
    links = sorted(tuple(sorted(link)) for links in found for link in links)
    assert links == sorted({tuple(sorted((i, (i + 1) % count))) for i in range(count if count > 1 else 0)})
