"""A rank that dies, hangs, fails or was started otherwise ends the others, with its name; one that is slow does not."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_zebra.errors import UserError
from megatron_zebra.parallel.agreement import facts
from megatron_zebra.parallel.process import world
from megatron_zebra.parallel.watch import Pace, watched
from tests.processes import Ranks, free_port

QUICK = Pace(beat=0.1, silence=3.0)
NEVER_BY_SILENCE = Pace(beat=0.1, silence=1000.0)
LIMIT = 100.0  # seconds that a loaded machine may take; what is measured is far below


def wait_for(folder: Path, count: int) -> None:
    """Return when ``count`` ranks have said that they are ready, and a moment for them to be where they wait."""
    end = time.monotonic() + LIMIT
    while len(list(folder.glob("ready-*"))) < count:
        assert time.monotonic() < end, [path.read_text() for path in folder.glob("*.stderr")]
        time.sleep(0.01)
    time.sleep(0.3)


def ready(folder: Path, rank: int) -> None:
    (folder / f"ready-{rank}").touch()


def hang(folder: Path, victim: int, pace: Pace) -> None:
    """In tensor-parallel pairs: the victim and its neighbour's neighbour do nothing, their partners wait for them."""
    with world("cpu", 600.0, tp=2, pace=pace) as grid:
        ready(folder, grid.rank)
        if grid.rank in (victim, (victim + 2) % 4):
            while True:
                time.sleep(0.1)
        grid.tp.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("victim", [3, 0])
def test_a_killed_rank_is_named_by_all_others(victim: int, tmp_path: Path) -> None:
    """One waits for the dead, one for a rank that lives, one is in no collective. Rank 0 keeps the store."""
    ranks = Ranks(tmp_path, hang, 4, tmp_path, victim, NEVER_BY_SILENCE)
    wait_for(tmp_path, 4)
    ranks.signal(victim, signal.SIGKILL)
    ends = ranks.wait(LIMIT)
    assert ends[victim].code == -signal.SIGKILL
    for rank in {0, 1, 2, 3} - {victim}:
        assert ends[rank].code == 1
        [line] = ends[rank].errors
        assert line.startswith(f"error: rank {victim} (pp 0, dp {victim // 2}, cp 0, tp {victim % 2}) ")
        assert "has died" in line
        assert "Traceback" not in ends[rank].stderr
        pair = "0, 1" if rank < 2 else "2, 3"
        place = "no collective" if rank == (victim + 2) % 4 else f"all-reduce of tp (ranks {pair})"
        assert f"; this rank (rank {rank}) was in {place}" in line


def meet(folder: Path, pace: Pace) -> None:
    """Rank 2 rests for a second, the others wait for it; then all leave, one after another."""
    with world("cpu", 600.0, pace=pace) as grid:
        ready(folder, grid.rank)
        if grid.rank == 2:
            time.sleep(1)
        grid.world.all_reduce(torch.zeros(1))
        time.sleep(0.2 * grid.rank)


def test_a_rank_that_stands_still_for_a_while_is_not_dead(tmp_path: Path) -> None:
    """Not the one that others wait for, nor the one that keeps the store."""
    ranks = Ranks(tmp_path, meet, 3, tmp_path, QUICK)
    wait_for(tmp_path, 3)
    for rank in (2, 0):
        ranks.signal(rank, signal.SIGSTOP)
    time.sleep(1.2)
    for rank in (2, 0):
        ranks.signal(rank, signal.SIGCONT)
    assert [(end.code, end.stderr) for end in ranks.wait(LIMIT)] == [(0, "")] * 3


def test_a_rank_that_stands_still_for_ever_is_dead(tmp_path: Path) -> None:
    """And ends itself when it moves again."""
    ranks = Ranks(tmp_path, hang, 4, tmp_path, 3, Pace(beat=0.1, silence=1.0))
    wait_for(tmp_path, 4)
    ranks.signal(3, signal.SIGSTOP)
    began = time.monotonic()
    while any(process.exitcode is None for process in ranks.processes[:3]):
        assert time.monotonic() < began + LIMIT
        time.sleep(0.01)
    ranks.signal(3, signal.SIGCONT)
    ends = ranks.wait(LIMIT)
    assert [end.code for end in ends] == [1] * 4
    for end in ends[:3]:
        assert "rank 3 (pp 0, dp 1, cp 0, tp 1) on " in end.errors[0]
        assert "has died or cannot be reached (silent for 1 s)" in end.errors[0]
    assert len(ends[3].errors) == 1


def test_ranks_that_end_well_say_nothing_and_do_not_wait(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, meet, 3, tmp_path, Pace(beat=5.0, silence=20.0))
    wait_for(tmp_path, 3)
    ends = ranks.wait(LIMIT)
    assert [(end.code, end.stderr) for end in ends] == [(0, "")] * 3
    assert max(end.seconds for end in ends) < 4  # of which 1.4 by ``meet`` itself; less than a beat


def fail(folder: Path, how: str, failing: list[int]) -> None:
    with world("cpu", 600.0, pace=NEVER_BY_SILENCE) as grid:
        grid.world.all_reduce(torch.zeros(1))
        if grid.rank in failing and how == "user":
            raise UserError(f"rank {grid.rank}: bad row")
        if grid.rank in failing:
            raise KeyError("a fault of ours")
        if grid.rank == 2:
            time.sleep(1000)  # in no collective that could break
        grid.world.all_reduce(torch.zeros(1))


def test_a_fault_of_ours_is_shown_once_and_named_by_the_others(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, fail, 3, tmp_path, "fault", [1]).wait(LIMIT)
    assert [end.code for end in ends] == [1] * 3
    assert ends[1].stderr.rstrip().endswith("KeyError: 'a fault of ours'")
    assert ends[1].stderr.count("Traceback") == 1
    for rank, place in [(0, "all-reduce of world (ranks 0, 1, 2)"), (2, "no collective (outside training)")]:
        assert ends[rank].stderr == (
            "error: rank 1 (pp 0, dp 1, cp 0, tp 0) has failed: KeyError: 'a fault of ours'; "
            f"this rank (rank {rank}) was in {place}\n"
        )


@pytest.mark.parametrize("failing", [[1], [0], [0, 1, 2]])
def test_one_rank_tells_a_mistake_and_the_others_end_quietly(failing: list[int], tmp_path: Path) -> None:
    ends = Ranks(tmp_path, fail, 3, tmp_path, "user", failing).wait(LIMIT)
    assert [end.code for end in ends] == [2] * 3
    told = [end.stderr for end in ends if end.stderr]
    assert len(told) == 1
    assert told[0] in [f"error: rank {rank}: bad row\n" for rank in failing]


def start_otherwise(tp: list[int]) -> None:
    own = tp[int(os.environ["RANK"])]
    same = facts({"parallel": {"tp": own}, "data": {"train": [{"prefix": f"/node{own}/a", "weight": 1.0}]}})
    with world("cpu", 600.0, tp=own, same=same, pace=QUICK):
        raise AssertionError("the groups cannot be made")


def test_different_configurations_are_found_at_the_start(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, start_otherwise, 4, [2, 1, 2, 4]).wait(LIMIT)
    assert [end.code for end in ends] == [2] * 4
    [line] = "".join(end.stderr for end in ends).splitlines()
    assert line == (
        "error: the ranks were started with different configurations: ranks 1, 3 of 4 not as rank 0: "
        "parallel.tp = 1 on rank 1, 2 on rank 0"
    )


def come_without_the_last() -> None:
    if os.environ["RANK"] != "2":
        with world("cpu", 2.0, pace=QUICK):
            pass


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ends = Ranks(tmp_path, come_without_the_last, 3).wait(LIMIT)
    assert [end.code for end in ends] == [2, 2, 0]
    text = "".join(end.stderr for end in ends)
    assert text == "error: rank 2 of 3 did not come within parallel.timeout = 2 seconds\n"


def test_facts_leave_out_where_a_node_keeps_its_data() -> None:
    data = {"train": [{"prefix": "/scratch/a", "weight": 2.0}], "cache_dir": "/scratch", "split": [0.9, 0.1]}
    assert facts({"data": data, "seed": 1}) == {"data.train[0].weight": "2.0", "data.split": "[0.9, 0.1]", "seed": "1"}


def keep_store(port: int) -> None:
    """What torchrun's agent is to its ranks."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store is not None:
        time.sleep(1)


def hang_under_a_launcher(folder: Path, port: int) -> None:
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": str(port)}
    with world("cpu", 600.0, pace=NEVER_BY_SILENCE) as grid:
        ready(folder, grid.rank)
        if grid.rank == 0:
            time.sleep(1000)
        grid.world.all_reduce(torch.zeros(1))


def test_a_killed_launcher_ends_its_ranks(tmp_path: Path) -> None:
    """And says so once a rank, though every call to the store it kept breaks."""
    port = free_port()
    launcher = multiprocessing.get_context("forkserver").Process(target=keep_store, args=(port,))
    launcher.start()
    ranks = Ranks(tmp_path, hang_under_a_launcher, 2, tmp_path, port)
    wait_for(tmp_path, 2)
    launcher.kill()
    for rank, end in enumerate(ranks.wait(LIMIT)):
        assert end.code == 1
        [line] = end.errors
        assert line.startswith("error: the launcher has died or cannot be reached: its store is gone; this rank (rank ")
        assert ("all-reduce of world (ranks 0, 1)" in line) == (rank == 1)
    launcher.join()


def sit(pace: Pace, folder: Path) -> None:
    with world("cpu", 600.0, pace=pace) as grid:
        ready(folder, grid.rank)
        time.sleep(1000 if grid.rank else 1)


def test_sigterm_ends_a_rank_that_nobody_has_died_for(tmp_path: Path) -> None:
    """The others take it for dead: it said nothing."""
    ranks = Ranks(tmp_path, sit, 2, NEVER_BY_SILENCE, tmp_path)
    wait_for(tmp_path, 2)
    ranks.signal(1, signal.SIGTERM)
    ends = ranks.wait(LIMIT)
    assert [end.code for end in ends] == [1, -signal.SIGTERM]
    assert "rank 1 (pp 0, dp 1, cp 0, tp 0) on " in ends[0].errors[0]


def as_worker(folder: Path) -> None:
    """What torchrun runs here: the watch over plain gloo, without the seconds that importing DeepSpeed takes."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = next(dist.rendezvous("env://"))[0]
    pace = Pace(beat=0.2, silence=1000.0)
    with watched(store, rank, size, lambda other: f"rank {other}", None, pace, dist.destroy_process_group):
        dist.init_process_group("gloo", store=dist.PrefixStore("pg", store), rank=rank, world_size=size)
        (folder / "victim").write_text(str(os.getpid())) if rank == 1 else None
        ready(folder, rank)
        if rank == 0:
            dist.recv(torch.zeros(1), 2)
        time.sleep(1000)


def test_a_killed_rank_is_named_under_torchrun(tmp_path: Path) -> None:
    """Whose SIGTERM comes before anybody has noticed: to one in Python, and one that hangs in a call for one that lives."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [sys.executable, *words, "-m", "tests.parallel.test_watch", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            wait_for(tmp_path, 3)
            began = time.monotonic()
            os.kill(int((tmp_path / "victim").read_text()), signal.SIGKILL)
            _, text = process.communicate(timeout=LIMIT)
        except BaseException:
            process.terminate()
            raise
    assert process.returncode == 1
    assert time.monotonic() - began < 25  # torchrun's SIGKILL would come after 30
    lines = sorted(line for line in text.splitlines() if line.startswith("error: "))
    assert len(lines) == 2
    for rank, line, place in zip((0, 2), lines, ("recv of ranks 0, 1, 2", "no collective")):
        assert line.startswith("error: rank 1 on ")
        assert f" has died; this rank (rank {rank}) was in {place}" in line


if __name__ == "__main__":
    try:
        as_worker(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(error.code)
