"""Run a function on several processes: ``run_distributed(fn, world_size, *args, tp=, cp=, pp=)`` gives the results of all ranks.

The processes are forked from one that has imported torch and DeepSpeed (which takes seconds), serve some calls, and join a
new process group for each. ``fn`` is a module-level function whose first argument is the Grid. Each world size has
processes of its own: DeepSpeed counts modules in a process-wide counter, and its ZeRO-3 compares the counts of ranks.
"""

import contextlib
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 150.0
CALLS = 10  # of a group of processes: DeepSpeed keeps what it was once given, and with it threads and connections of each call


class Pool:
    """Waiting processes; a failed call ends them all, since some may hang in a collective."""

    def __init__(self) -> None:
        # A server imports once what takes seconds; each process is forked from it before any thread or group exists.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.preload"])
        self.workers: dict[int, list[Any]] = {}
        self.calls: dict[int, int] = {}

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, **axes: int) -> list[Any]:
        """Results of ``fn(grid, *args)`` by rank, the grid of ``axes`` (tp, cp, pp); an AssertionError with the traceback of the first rank that failed."""
        workers = self._started(world_size)
        port = _free_port()
        for rank in range(world_size):
            workers[rank][1].put((fn, rank, world_size, port, args, axes))
        results: list[Any] = [None] * world_size
        waiting, failures, deadline = set(range(world_size)), [], time.monotonic() + TIMEOUT
        while waiting and time.monotonic() < deadline:
            for rank in list(waiting):
                with contextlib.suppress(queue.Empty):
                    ok, results[rank] = workers[rank][2].get(timeout=0.02)
                    waiting.remove(rank)
                    if not ok:
                        failures.append(f"rank {rank} of {world_size} failed:\n{results[rank]}")
                        # The others may hang in a collective; those that failed too get a moment to say so.
                        deadline = min(deadline, time.monotonic() + 2)
        if waiting or failures:
            self.stop(world_size)
            raise AssertionError("\n".join([*failures, f"no result from ranks {sorted(waiting)}"]))
        self.calls[world_size] += 1
        if self.calls[world_size] == CALLS:
            self.stop(world_size)
        return results

    def stop(self, *sizes: int) -> None:
        """End the processes of these world sizes (none given: of all)."""
        for size in sizes or list(self.workers):
            for process, _, _ in self.workers.pop(size):
                process.kill()
                process.join()

    def _started(self, count: int) -> list[Any]:
        if count not in self.workers:
            self.workers[count], self.calls[count] = [], 0
            for _ in range(count):
                jobs, results = self.context.Queue(), self.context.Queue()
                process = self.context.Process(target=_work, args=(jobs, results), daemon=True)
                process.start()
                self.workers[count].append((process, jobs, results))
        return self.workers[count]


def _work(jobs: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from megatron_zebra.parallel.process import world

    torch.set_num_threads(1)
    while True:
        fn, rank, world_size, port, args, axes = jobs.get()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with world("cpu", 60.0, **axes) as grid:
                results.put((True, fn(grid, *args)))
        except BaseException:
            results.put((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
