"""Signals on their way to the training processes, restarts, and the exit code."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_zebra.launching import supervise as module
from megatron_zebra.launching.supervise import AGAIN, DONE, FAILED, LOST, MISTAKE, Node0, supervise
from megatron_zebra.launching.with_deepspeed import RETRY


def launcher(folder: Path, trap: str, then: str = "exit $?") -> list[str]:
    """A launcher of one rank in bash: ``trap`` is what the rank does on SIGTERM, ``then`` what the launcher does afterwards."""
    trapped = f"trap '{trap}' TERM" if trap else ":"
    (folder / "rank.sh").write_text(f"{trapped}; echo >> {folder}/up; while :; do sleep 0.05; done")
    return ["bash", "-c", f"start() {{ RANK=0 bash {folder}/rank.sh & wait $!; }}; start; {then}"]


def signal_when(ready: Callable[[], bool], number: int) -> threading.Thread:
    """Send ``number`` to this process once ``ready``."""

    def send() -> None:
        until = time.monotonic() + 20
        while not ready() and time.monotonic() < until:
            time.sleep(0.02)
        if ready():  # else the handlers are gone, and the test fails by itself
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("code", "finished", "expected"),
    [
        (0, True, DONE),
        (0, False, AGAIN),
        (1, True, FAILED),
        (2, False, MISTAKE),
        (137, False, FAILED),
        (70, False, FAILED),
    ],
)
def test_the_exit_code_without_a_signal(code: int, finished: bool, expected: int) -> None:
    """A rank that another node's signal has stopped ends with 0, short of the last step: that is no success."""
    assert supervise(lambda: ["bash", "-c", f"exit {code}"], 0, {LOST}, lambda: finished) == expected


@pytest.mark.parametrize(
    ("retry", "restarts", "starts"),
    [(range(1, 256), 2, 3), (range(1, 256), 0, 1), ({LOST}, 2, 1), (range(1, 256), 9, 4)],
)
def test_restarts(tmp_path: Path, retry: range, restarts: int, starts: int) -> None:
    """Each start leaves a line; the fourth succeeds."""
    script = f"echo >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) = 4 ] || exit 1"
    code = supervise(lambda: ["bash", "-c", script], restarts, retry, lambda: True)
    assert (tmp_path / "starts").read_text().count("\n") == starts
    assert code == (DONE if starts == 4 else FAILED)


@pytest.mark.parametrize("retry", [{LOST}, RETRY], ids=["torchrun", "deepspeed"])
def test_a_mistake_of_the_user_is_not_tried_again(tmp_path: Path, retry: set[int]) -> None:
    script = f"echo >> {tmp_path}/starts; exit 2"
    assert supervise(lambda: ["bash", "-c", script], 5, retry, lambda: False) == MISTAKE
    assert (tmp_path / "starts").read_text() == "\n"


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """As if the tests were not started with nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("finished", "expected"), [(False, AGAIN), (True, DONE)])
def test_a_signal_reaches_the_rank_as_sigterm(tmp_path: Path, number: int, finished: bool, expected: int) -> None:
    sender = signal_when((tmp_path / "up").exists, number)
    code = supervise(lambda: launcher(tmp_path, f"touch {tmp_path}/saved; exit 0"), 3, {1}, lambda: finished)
    sender.join()
    assert code == expected
    assert (tmp_path / "saved").exists()


def test_what_nohup_starts_outlives_its_terminal(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sender = signal_when((tmp_path / "up").exists, signal.SIGHUP)
    try:
        assert supervise(lambda: ["bash", "-c", f"touch {tmp_path}/up; sleep 1"], 0, {1}, lambda: True) == DONE
    finally:
        sender.join()
        signal.signal(signal.SIGHUP, former)


def test_a_rank_that_dies_of_the_signal_is_not_started_again(tmp_path: Path) -> None:
    """As torchrun does with --max-restarts where the processes had not come to the training."""
    sender = signal_when((tmp_path / "up").exists, signal.SIGTERM)
    again = "for i in 1 2 3 4 5 6 7 8; do start; done"
    assert supervise(lambda: launcher(tmp_path, "", then=again), 3, {1}, lambda: False) == AGAIN
    sender.join()
    assert (tmp_path / "up").read_text().count("\n") <= 3


def test_a_launcher_without_a_rank_yet_is_ended(tmp_path: Path) -> None:
    sender = signal_when((tmp_path / "up").exists, signal.SIGTERM)
    assert supervise(lambda: ["bash", "-c", f"touch {tmp_path}/up; sleep 60"], 3, {1}, lambda: False) == AGAIN
    sender.join()


def test_what_is_wrong_after_a_signal_is_still_told(tmp_path: Path) -> None:
    """A last checkpoint that did not fit on the disk, for one."""
    sender = signal_when((tmp_path / "up").exists, signal.SIGTERM)
    assert supervise(lambda: launcher(tmp_path, "exit 2"), 3, {1}, lambda: False) == MISTAKE
    sender.join()


def test_a_launcher_that_hangs_over_a_lost_node_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its rank has ended, the node of the meeting place does not answer, and torch waits for it for ever."""
    monkeypatch.setattr(module, "SILENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answered = iter([True])
        monkeypatch.setattr(Node0, "answers", lambda self: next(answered, False))
        script = "RANK=0 sleep 1.5; sleep 60"
        code = supervise(lambda: ["bash", "-c", script], 0, {LOST}, lambda: False, Node0("127.0.0.1", port))
    assert code == FAILED
    assert capfd.readouterr().err == f"error: 127.0.0.1:{port}, where the nodes meet, cannot be reached\n"


def test_a_node_that_never_answers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = taken.getsockname()[1]
        assert supervise(lambda: ["false"], 3, {LOST}, lambda: False, Node0("127.0.0.1", port)) == FAILED
    assert capfd.readouterr().err == f"error: 127.0.0.1:{port}, where the nodes meet, did not answer within 0.1 s\n"


def test_ranks_are_the_topmost_processes_that_a_launcher_made_one() -> None:
    """A process that a rank starts inherits its RANK, and is not one."""
    script = "RANK=3 bash -c 'sleep 30 & wait' & wait"
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as process:
        until = time.monotonic() + 10
        while not (found := module.ranks_below(process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
        assert [rank.environ()["RANK"] for rank in found] == ["3"]
        os.killpg(process.pid, signal.SIGKILL)


def test_ranks_that_another_process_started_are_known_by_their_words(tmp_path: Path) -> None:
    """As where sshd has started them: with RANK, the training's words at the end, and not a rank's own fork."""
    (tmp_path / "rank.sh").write_text("sleep 30 & (sleep 30; true) & wait")
    words = ["--config", f"{tmp_path}/my.yaml"]
    command = ["bash", f"{tmp_path}/rank.sh", *words]
    with (
        subprocess.Popen(command, env=os.environ | {"RANK": "1"}, start_new_session=True) as rank,
        subprocess.Popen(command, start_new_session=True) as other,
    ):
        until = time.monotonic() + 10
        while not (found := module.ranks_with(words)) and time.monotonic() < until:
            time.sleep(0.02)
        assert [process.pid for process in found] == [rank.pid]
        for process in (rank, other):
            os.killpg(process.pid, signal.SIGKILL)
