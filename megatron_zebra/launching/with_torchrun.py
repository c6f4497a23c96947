"""One node's part of a run by torchrun: ``python -m megatron_zebra.launching.with_torchrun [OPTION ...] --config FILE [...]``.

Options that are not listed here go to torchrun as they are.
"""

import argparse
import functools
import os
import re
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_zebra.errors import UserError, run_tool
from megatron_zebra.launching.command import TRAINING, WORKER, Training, rehearsed, split
from megatron_zebra.launching.supervise import LOST, Node0, at_last_step, supervise

PORT = 29500


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "launch/torchrun.sh",
        usage="bash launch/torchrun.sh [OPTION ...] --config FILE [--section.key VALUE ...]",
        epilog="Every other option before --config goes to torchrun as it is. --like_this is the same as --like-this.",
        allow_abbrev=False,
    )
    top.add_argument("--nnodes", default="1", metavar="N", help="nodes, or MIN:MAX (default: 1)")
    top.add_argument("--nproc-per-node", type=int, metavar="N", help="processes a node (default: its GPUs, or 1)")
    top.add_argument("--rdzv-endpoint", metavar="HOST[:PORT]", help=f"where the nodes meet: one of them (port: {PORT})")
    top.add_argument("--rdzv-id", default="zebra", metavar="NAME", help="the same on all nodes of a run")
    top.add_argument("--max-restarts", type=int, default=0, metavar="N", help="starts after a failure (default: 0)")
    top.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="for what the processes write (default: in the run folder)"
    )
    top.add_argument("--no-check", action="store_true", help="leave out the check of the nodes")
    return top


def main() -> None:
    words, training_words = split(sys.argv[1:])
    options, others = parser().parse_known_args(dashed(words))
    nodes = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", options.nnodes)
    if nodes is None:
        raise UserError(f"--nnodes {options.nnodes}: must be a whole number from 1, or MIN:MAX")
    least, most = int(nodes[1]), int(nodes[2] or nodes[1])
    processes = options.nproc_per_node if options.nproc_per_node is not None else visible_gpus() or 1
    if processes < 1 or options.max_restarts < 0 or most < least:
        raise UserError("--nproc-per-node must be 1 or more, --max-restarts 0 or more, MAX of --nnodes at least MIN")
    if most > 1 and not options.rdzv_endpoint:
        raise UserError(f"--rdzv-endpoint HOST[:PORT]: must name one of the {most} nodes, the same on all")
    training = rehearsed(training_words, sorted({least * processes, most * processes}))
    node0 = _node0(options.rdzv_endpoint) if options.rdzv_endpoint else None
    here = node0 is None or is_this_node(node0.host)
    logs = node_logs(training, options.log_dir)

    def command() -> list[str]:
        return [
            *(sys.executable, "-m", "megatron_zebra.launching.agent", "--nnodes", options.nnodes),
            *("--nproc-per-node", str(processes), "--max-restarts", str(options.max_restarts)),
            *(_meeting(node0, here, options.rdzv_id) if node0 else ["--standalone"]),
            *("--tee", "3", "--log-dir", str(logs), *others),
            *("--module", TRAINING if options.no_check else WORKER, *training.words),
        ]

    # With torchrun's own store a node that returns would wait for an address that is written in the first round alone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}] ")
    finished = functools.partial(at_last_step, training.config, training.folder)
    sys.exit(supervise(command, options.max_restarts, {LOST}, finished, None if here else node0))


def dashed(words: Sequence[str]) -> list[str]:
    """torchrun's options spelt one way: it takes ``--max_restarts`` for ``--max-restarts``."""
    halves = [word.partition("=") for word in words]
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in halves
    ]


def node_logs(training: Training, given: Path | None) -> Path:
    """Where this node's processes write: a folder for each start, in it attempt_N/LOCAL_RANK/stdout.log and stderr.log."""
    folder = given or training.folder / "logs" / f"node-{socket.gethostname()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        name = f"--log-dir {given}" if given else f"logging.run_dir = {training.folder}"
        raise UserError(f"{name}: cannot be written ({error.strerror})") from None
    return folder


def visible_gpus() -> int:
    """GPUs of this node, without torch: CUDA_VISIBLE_DEVICES, or NVIDIA's device files."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([one for one in visible.split(",") if one.strip()])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def _node0(endpoint: str) -> Node0:
    host, _, port = endpoint.partition(":")
    port = port or str(PORT)
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise UserError(f"--rdzv-endpoint {endpoint}: must be HOST or HOST:PORT, a port from 1 to 65535")
    return Node0(host, int(port))


def _meeting(node0: Node0, here: bool, name: str) -> list[str]:
    """torchrun's options to meet there; ``here``: this node keeps the place."""
    return [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{node0.host}:{node0.port}", "--rdzv-id", name),
        *("--rdzv-conf", f"is_host={int(here)}", "--local-addr", _own_address(node0)),
    ]


def _own_address(node0: Node0) -> str:
    """The address from which this node reaches the first one; its name may be one that the others cannot resolve."""
    try:
        family, _, _, _, address = socket.getaddrinfo(node0.host, node0.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def is_this_node(host: str) -> bool:
    """Whether ``host`` is a name or an address of this node (torch knows that of the host's own name alone)."""
    if host.partition(".")[0] == socket.gethostname().partition(".")[0]:
        return True
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    for address in addresses:
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return True
    return False


if __name__ == "__main__":
    run_tool(main)
