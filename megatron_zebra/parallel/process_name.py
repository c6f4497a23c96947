"""A name for a process that other processes of its machine can look after. Reads /proc; no torch."""

import os
import socket
from pathlib import Path


def this_process() -> str:
    """Names this process on its machine: host, boot, process namespace, process, its start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        return " ".join([socket.gethostname(), boot, namespace, str(os.getpid()), _start_of(os.getpid()) or "-"])
    except OSError:  # not Linux: silence alone tells
        return f"{socket.gethostname()} - - {os.getpid()} -"


def host_of(process: str | None) -> str:
    return process.split()[0] if process else "its host"


def is_gone(process: str, this_process: str) -> bool:
    """Whether ``process`` ran on this machine and does so no more. False for processes of other machines."""
    *machine, pid, start = process.split()
    return start != "-" and machine == this_process.split()[:-2] and _start_of(int(pid)) != start


def _start_of(pid: int) -> str | None:
    """When the process started, in ticks since boot; None if it runs no more."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
