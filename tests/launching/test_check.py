"""The check of the nodes on real processes over gloo; each process says that it is a node of its own."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_zebra.launched import launched
from tests.processes import Ended, Ranks


def checked(folder: Path, changes: dict[int, dict[str, str]], blind: tuple[int, ...]) -> None:
    """The check on this rank: host hN, its facts changed as ``changes`` has it, in another folder if it is blind."""
    import datetime

    from megatron_zebra.launching import check
    from megatron_zebra.launching.nodes import Node
    from megatron_zebra.parallel.process import meeting_store

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    os.dup2(2, 1)  # what is printed is looked at too
    honest = check.this_node

    def node(*arguments: object) -> Node:
        one = honest(*arguments)
        return replace(one, host=f"h{rank}", facts=one.facts | changes.get(rank, {}))

    check.this_node = node
    check.PATIENCE = 2.0
    started = launched()
    store, _ = meeting_store(rank, started.world_size, datetime.timedelta(seconds=30))
    check.check_nodes(store, started, "cpu", folder / "elsewhere" if rank in blind else folder, 30)


def run(
    folder: Path, size: int, changes: dict[int, dict[str, str]] | None = None, blind: tuple[int, ...] = ()
) -> list[Ended]:
    return Ranks(folder, checked, size, folder / "run", changes or {}, blind).wait(120)


def test_equal_nodes_are_measured(tmp_path: Path) -> None:
    ends = run(tmp_path, 3)
    assert [end.code for end in ends] == [0, 0, 0], ends
    first, second = ends[0].stderr.splitlines()[:2]
    assert first.startswith("nodes: h0, h1, h2; 1 process each; equal versions, one run folder")
    assert second.startswith("nodes: all-reduce of 4 MiB: ")
    assert "GB/s over all 3 ranks" in second
    assert "received by a node from the next" in second
    assert ends[1].stderr == ends[2].stderr == ""
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_with_another_version_ends_all_in_one_line(tmp_path: Path) -> None:
    ends = run(tmp_path, 3, {1: {"deepspeed": "0.18.0"}})
    assert [end.code for end in ends] == [2, 2, 2]
    (line,) = ends[0].stderr.splitlines()
    assert line.startswith("error: deepspeed differs: 0.18.0 on h1; ")
    assert line.endswith(" on h0, h2")
    assert ends[1].stderr == ends[2].stderr == ""


def test_a_folder_of_its_own_ends_all_in_one_line(tmp_path: Path) -> None:
    ends = run(tmp_path, 2, blind=(1,))
    assert [end.code for end in ends] == [2, 2]
    assert ends[0].errors == [
        f"error: logging.run_dir = {tmp_path}/run: h1 cannot read there what h0 wrote; it must lie on storage that all nodes share"
    ]


def test_alone_it_measures_nothing(tmp_path: Path) -> None:
    (end,) = run(tmp_path, 1)
    assert end.code == 0, end
    assert end.stderr.splitlines()[0].startswith("nodes: h0; 1 process each")
    assert "all-reduce" not in end.stderr


def test_a_slow_node_is_warned_of_by_what_it_is_slow_in() -> None:
    from megatron_zebra.launching.bandwidth import Figures
    from megatron_zebra.launching.check import _told
    from megatron_zebra.launching.nodes import Node

    nodes = [Node(host, {"torch": "2.13", "NCCL": "2.28", "GPUs": "8 x H100"}, 8, 8, True) for host in "abcd"]
    figures = Figures(1 << 28, 150e9, [300e9, 290e9, 110e9, 301e9], [40e9, 12e9, 41e9, 42e9])
    lines = _told(nodes, figures)
    assert lines[0] == (
        "nodes: a, b, c, d; 8 processes each, GPUs: 8 x H100; equal versions, one run folder (torch 2.13, NCCL 2.28)"
    )
    assert lines[1] == (
        "nodes: all-reduce of 256 MiB: 150.00 GB/s over all 32 ranks, 110.00 to 301.00 GB/s within a node, "
        "12.00 to 42.00 GB/s received by a node from the next"
    )
    assert lines[2:] == [
        "warning: c is slow within it: 110.00 GB/s, the median is 295.00",
        "warning: b is slow with its neighbours: 12.00 GB/s, the median is 40.50",
    ]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_names_of_this_node(name: str) -> None:
    from megatron_zebra.launching.with_torchrun import is_this_node

    assert is_this_node(name)
    assert not is_this_node("192.0.2.1")  # reserved for documentation: no machine has it
