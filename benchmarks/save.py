"""What saves cost training: none, blocking, and beside it, on the same steps of a model of about 500M parameters.

  python benchmarks/save.py                                # about 20 GB of memory, 20 GB of disk, a quarter of an hour on two cores
  python benchmarks/save.py --hidden_size 512 --steps 9    # 50M parameters

One process. The delay is the time of all steps, waits for saves among it, beyond that of the run without saves, a save. The
last save of a run always blocks and is not counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(
    hidden_size: int, steps: int, interval: int, background: bool, where: Path
) -> tuple[float, list[float], str]:
    """Seconds of all steps, seconds that training waited at each save, and what was said of the saves."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        settings = {
            "model.hidden_size": hidden_size,
            "model.num_layers": 12,
            "model.num_heads": hidden_size // 64,
            "model.num_kv_heads": hidden_size // 64,
            "model.vocab_size": 8192,
            "data.sequence_length": 512,
            "data.synthetic.documents": 200,
            "data.synthetic.mean_length": 400,
            "training.global_batch_size": 1,
            "training.precision": "fp32",
            "training.steps": steps,
            "optimizer.zero_stage": 0,
            "checkpoint.interval": interval,
            "checkpoint.keep_last": 1,
            "checkpoint.background": str(background).lower(),
            "evaluation.interval": 0,
            "logging.run_dir": folder,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(
            [sys.executable, "pretrain_zebra.py", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    said = re.findall(r"step-\d+: (.*)", done.stderr)
    waits = [record["save_time"] for record in records if record["save_time"]]
    # The first step warms up.
    return sum(record["step_time"] + record["save_time"] for record in records[1:]), waits, "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1792)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--interval", type=int, default=6)
    parser.add_argument(
        "--where", type=Path, default=None, help="a folder of the disk to save to (default: the temporary one)"
    )
    options = parser.parse_args()
    saves = (options.steps - 1) // options.interval
    print(f"{'saves':10} {'seconds of steps':>17} {'delay a save':>13}  waits (s)")
    base = 0.0
    for name, interval, background in (
        ("none", 0, False),
        ("blocking", options.interval, False),
        ("beside", options.interval, True),
    ):
        seconds, waits, said = measure(options.hidden_size, options.steps, interval, background, options.where)
        base = base or seconds
        delay = (seconds - base) / saves
        print(
            f"{name:10} {seconds:17.1f} {delay:13.2f}  {', '.join(f'{wait:.2f}' for wait in waits)}   {said}",
            flush=True,
        )


if __name__ == "__main__":
    main()
