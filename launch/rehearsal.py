#!/usr/bin/env python
"""Several nodes on one machine: train over a virtual network, cut a node off in the middle, let it return, compare the losses.

    python launch/rehearsal.py [--folder DIR] [--tp 1] [--power-cut] [--loopback]

Two network namespaces stand for two nodes, with a host name and an address each and a virtual cable between them (needs
root and `ip`). With --loopback, or where that is not allowed, they are 127.0.0.2 and 127.0.0.3 of this machine, and a node
is cut off by killing it. Each node runs launch/torchrun.sh: tp within a node, dp 2 over the network.

An uninterrupted run comes first. In the second, node b's cable is pulled after some steps: both nodes must end their processes
by themselves, node a naming a rank of b. The cable is put back, b returns by itself, and the run goes on from its checkpoint.
With --power-cut all of b is killed when its cable is pulled, and b is started again. The and gradient norms of every step must be those of the first run, bit for bit. Exit code 0 if all is so.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVED, CUT = 20, 5, 7  # of the run, between checkpoints, and when the cable is pulled
SETTINGS = {"training.steps": STEPS, "checkpoint.interval": SAVED, "evaluation.interval": 0}
SAME = ("step", "loss", "grad_norm", "consumed_tokens")


@dataclass(frozen=True)
class Node:
    """``inside``: the words before a command that is to run on it."""

    name: str
    address: str
    inside: list[str]
    variables: dict[str, str]


class Network:
    """Two nodes and the cable between them; ``real``: in namespaces."""

    def __init__(self, real: bool) -> None:
        self.real = real
        self.tag = f"zebra{os.getpid()}"
        if real:
            self.nodes = [self._node(letter, f"10.213.77.{i}") for i, letter in enumerate("ab", start=1)]
        else:
            self.nodes = [
                Node(letter, f"127.0.0.{i}", [], {"GLOO_SOCKET_IFNAME": "lo"}) for i, letter in enumerate("ab", start=2)
            ]

    def _node(self, letter: str, address: str) -> Node:
        space = f"{self.tag}{letter}"
        name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"node-{letter}"]
        return Node(letter, address, ["ip", "netns", "exec", space, *name], {"GLOO_SOCKET_IFNAME": "cable"})

    def plug_in(self) -> None:
        """Make namespaces and cable; a CalledProcessError where that is not allowed."""
        if not self.real:
            return
        ends = [f"{self.tag[-9:]}{node.name}" for node in self.nodes]
        for node in self.nodes:
            _ip("netns", "add", self.tag + node.name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for node, end in zip(self.nodes, ends):
            _ip("link", "set", end, "netns", self.tag + node.name, "name", "cable")
            _ip("-n", self.tag + node.name, "addr", "add", f"{node.address}/24", "dev", "cable")
            _ip("-n", self.tag + node.name, "link", "set", "lo", "up")
            _ip("-n", self.tag + node.name, "link", "set", "cable", "up")

    def cable(self, state: str) -> None:
        """Pull it (down) or put it back (up) at node b."""
        if self.real:
            _ip("-n", f"{self.tag}b", "link", "set", "cable", state)

    def take_away(self) -> None:
        """Leave nothing behind: a cable goes with its namespaces."""
        for node in self.nodes if self.real else ():
            subprocess.run(["ip", "netns", "del", self.tag + node.name], stderr=subprocess.DEVNULL, check=False)


class Job:
    """launch/torchrun.sh on one node, its output in a file."""

    def __init__(self, network: Network, node: Node, run_dir: Path, restarts: int, port: int, tp: int) -> None:
        first = network.nodes[0]
        options = ["--nnodes", "2", "--nproc-per-node", str(tp), "--max-restarts", str(restarts)]
        options += ["--rdzv-endpoint", f"{first.address}:{port}"]
        if not network.real:  # both addresses are this machine's, so each is told which it is
            options += ["--local-addr", node.address, "--rdzv-conf", f"is_host={int(node is first)}"]
        words = [w for key, value in (SETTINGS | {"parallel.tp": tp}).items() for w in (f"--{key}", str(value))]
        self.name, self.log = node.name, run_dir.parent / f"{run_dir.name}-{node.name}.log"
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [
                    *(*node.inside, "bash", str(ROOT / "launch/torchrun.sh"), *options),
                    *("--config", str(ROOT / "launch/recipes/debug.yaml"), "--logging.run_dir", str(run_dir), *words),
                ],
                env=os.environ | node.variables,
                stdout=out,
                stderr=out,
            )

    def wait(self, seconds: float) -> int:
        """Its exit code; an AssertionError if it has not ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {self.name} has not ended after {seconds:g} s: {self.tail()}") from None

    def kill(self) -> None:
        """End it and all below it at once, as a power cut does."""
        import psutil

        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            family = [top, *top.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def tail(self) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text().splitlines()[-15:])


def rehearse(folder: Path, network: Network, tp: int, power_cut: bool) -> None:
    """Both runs and their comparison; an AssertionError says what was not as it should be."""
    a, b = network.nodes
    of_b = f"[{tp}-{2 * tp - 1}]"
    with _jobs() as jobs:

        def start(node: Node, run: str, restarts: int = 0) -> Job:
            jobs.append(Job(network, node, folder / run, restarts, port, tp))
            return jobs[-1]

        port = _free_port()
        pair = [start(node, "whole") for node in network.nodes]
        codes = [job.wait(180) for job in pair]
        assert codes == [0, 0], f"the uninterrupted run ended with {codes}: {pair[0].tail()}"
        say(f"uninterrupted: {STEPS} steps")

        port = _free_port()
        ours, theirs = start(a, "cut", restarts=2), start(b, "cut", restarts=1)
        _wait_for_step(folder / "cut", CUT, ours)
        network.cable("down")
        killed = power_cut or not network.real
        if killed:
            theirs.kill()
        cut = time.monotonic()
        say(f"node b cut off in step {len(_records(folder / 'cut')) + 1}")
        told = _wait_for_line(ours, rf"error: (rank {of_b} .*(?:died|cannot be reached).*)", 60)
        say(f"after {time.monotonic() - cut:.0f} s node a says: {told}")
        if killed:
            network.cable("up")
            theirs = start(b, "cut")
        else:
            _wait_for_line(theirs, "error: (.* cannot be reached)$", 120)
            say(f"after {time.monotonic() - cut:.0f} s node b has ended its part too; the cable is put back")
            network.cable("up")
        codes = [ours.wait(180), theirs.wait(60)]
        assert codes == [0, 0], f"after the return the nodes ended with {codes}: {ours.tail()}"
        log = (folder / "cut" / "logs" / "rank-00000.log").read_text()
        resumed = re.search(r"resumed .* at step (\d+)", log)
        assert resumed, log[-2000:]
        say(f"node b returned; resumed at step {resumed[1]}")
    whole, cut_off = _records(folder / "whole"), _records(folder / "cut")
    assert len(whole) == STEPS, f"{len(whole)} steps"
    for want, got in zip(whole, cut_off, strict=True):
        assert want == got, f"{got} is not {want}"
    say(f"loss and gradient norm of all {STEPS} steps equal the uninterrupted run's, bit for bit")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


@contextlib.contextmanager
def _jobs() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _records(run_dir: Path) -> list[dict[str, object]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [{name: json.loads(line)[name] for name in SAME} for line in lines if line.endswith("\n")]


def _wait_for_step(run_dir: Path, step: int, job: Job) -> None:
    until = time.monotonic() + 180
    while len(_records(run_dir)) < step:
        assert job.process.poll() is None and time.monotonic() < until, f"no step {step}: {job.tail()}"  # noqa: PT018
        time.sleep(0.02)


def _wait_for_line(job: Job, pattern: str, seconds: float) -> str:
    until = time.monotonic() + seconds
    while not (found := re.search(pattern, job.log.read_text())):
        assert time.monotonic() < until, f"no line like {pattern} within {seconds:g} s: {job.tail()}"
        time.sleep(0.1)
    return found[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    top.add_argument("--tp", type=int, choices=(1, 2), default=2, help="processes of each node (default: 2)")
    top.add_argument("--power-cut", action="store_true", help="kill all of node b when its cable is pulled")
    top.add_argument("--loopback", action="store_true", help="no namespaces: two addresses of this machine")
    return top


def main(words: Sequence[str]) -> int:
    arguments = parser().parse_args(words)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that namespaces and processes go
    network = Network(real=not arguments.loopback)
    try:
        try:
            network.plug_in()
        except (OSError, subprocess.CalledProcessError) as error:
            network.take_away()
            network = Network(real=False)
            say(f"namespaces are not allowed here ({error}); taking two addresses of this machine")
        where = "namespaces" if network.real else "addresses"
        say(
            f"nodes: {', '.join(f'{node.name} at {node.address}' for node in network.nodes)} ({where}); logs in {folder}"
        )
        rehearse(folder, network, arguments.tp, arguments.power_cut)
    except AssertionError as problem:
        say(f"FAILED: {problem}")
        return 1
    finally:
        network.take_away()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
