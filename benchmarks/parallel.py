"""Training steps under every small layout, on this machine's CPUs: tokens/s, memory and bytes of a rank; then context
parallelism at 32k tokens with a window of 512 against all layers full. One thread a process; prints tables.

  python benchmarks/parallel.py                 # both tables; about twenty minutes on two cores
  python benchmarks/parallel.py --only layouts
  python benchmarks/parallel.py --only context --length 16384

Processes share the cores, so more of them are not faster here: compare layouts of the same number of processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "model.hidden_size": 256,
    "model.num_layers": 8,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.ffn_hidden_size": 704,
    "model.vocab_size": 8192,
    "model.layer_group_size": 4,
    "model.window_size": 128,
    "data.sequence_length": 2048,
    "data.synthetic.documents": 2000,
    "data.synthetic.mean_length": 1000,
    "training.global_batch_size": 4,
    "training.precision": "fp32",
    "training.steps": 2,
}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"tp": 2}),
    (2, {"cp": 2}),
    (2, {"cp": 2, "cp_order": "contiguous"}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "pp_schedule": "interleaved"}),
    (2, {"pp": 2, "pp_schedule": "zero_bubble"}),
    (4, {}),
    (4, {"tp": 2}),
    (4, {"tp": 4}),
    (4, {"cp": 2}),
    (4, {"cp": 4}),
    (4, {"pp": 2}),
    (4, {"pp": 4}),
    (4, {"tp": 2, "cp": 2}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"cp": 2, "pp": 2}),
]


def measure(processes: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The last step's record of a run of ``pretrain_zebra.py``."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [
            word for key, value in (settings | {"logging.run_dir": run}).items() for word in (f"--{key}", str(value))
        ]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, "pretrain_zebra.py", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def show(name: str, record: dict[str, Any]) -> None:
    sent = "  ".join(
        f"{key.split('/')[1]} {count / 2**20:,.1f}"
        for key, count in record.items()
        if key.startswith("communication_bytes/")
    )
    print(
        f"{name:28}{record['tokens_per_second']:>9,.0f}{record['peak_memory_bytes'] / 2**30:>8.2f}"
        f"{record['exchange_time'] / record['step_time']:>9.0%}   {sent}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["layouts", "context"])
    parser.add_argument("--length", type=int, default=32768, help="tokens of the second table's row (default: 32768)")
    arguments = parser.parse_args()
    print(f"{'layout':28}{'tokens/s':>9}{'GiB':>8}{'waiting':>9}   MiB that rank 0 received in a step")
    if arguments.only != "context":
        for processes, layout in LAYOUTS:
            settings = MODEL | {f"parallel.{key}": value for key, value in layout.items()}
            name = " ".join(str(v) if isinstance(v, str) else f"{k}{v}" for k, v in layout.items())
            show(f"{processes} processes  {name or f'dp{processes}'}", measure(processes, settings))
    if arguments.only != "layouts":
        long = MODEL | {
            "model.num_layers": 4,
            "model.window_size": 512,
            "data.sequence_length": arguments.length,
            "data.synthetic.documents": 20,
            "data.synthetic.mean_length": 10 * arguments.length,
            "training.global_batch_size": 1,
            "training.steps": 1,
        }
        for processes in (2, 4):
            for name, group in (("Zebra, w 512", 4), ("all layers full", 1)):
                changes = {"model.layer_group_size": group, "parallel.cp": processes}
                show(f"cp{processes} {arguments.length} {name}", measure(processes, long | changes))


if __name__ == "__main__":
    main()
