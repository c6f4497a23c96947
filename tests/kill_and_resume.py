#!/usr/bin/env python
"""Kill -9 a run at random moments, resume it each time, and compare it with a run that was never stopped.

    python tests/kill_and_resume.py [--kills 20] [--stage 1] [--seed 0] [--folder DIR]

A small run by torchrun with two processes saves after every step, so that most of its time is spent in saves and kills
hit them. All its processes are killed together: some kills fall into the start, the others into a random moment of the
training. Before each resume every checkpoint that has an index is verified, and after every fifth kill a byte of the
newest one is turned, as a failing disk would. The resumed run must begin at the newest one that is good. In the end
every line of metrics.jsonl must have the loss, the gradient norm, the learning rate and the place in the data of the run
that was never stopped, bit for bit. Not collected by pytest: it takes some minutes. Exit code 0 if all is so, 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SAME = ("step", "loss", "grad_norm", "learning_rate", "consumed_rows", "consumed_tokens", "targets", "skipped_steps")


def command(folder: Path, steps: int, stage: int) -> list[str]:
    overrides = {
        "training.steps": steps,
        "training.global_batch_size": 4,
        "data.sequence_length": 64,
        "data.synthetic.documents": 300,
        "data.synthetic.mean_length": 40,
        "optimizer.zero_stage": stage,
        "checkpoint.interval": 1,
        "checkpoint.keep_last": 3,
        "evaluation.interval": 0,
        "logging.run_dir": folder,
    }
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "pretrain_zebra.py", "--config", "launch/recipes/debug.yaml", *words]


def lines(folder: Path) -> list[dict[str, object]]:
    """Whole lines of metrics.jsonl, each with what must be the same."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: record[name] for name in SAME} for record in whole]


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and every process below it, as near to one moment as can be."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()
    psutil.wait_procs(family, timeout=10)


def inspect(folder: Path) -> tuple[list[int], list[str], int]:
    """Steps of the good checkpoints, problems of damaged ones that have an index, and the number of half-written ones."""
    from megatron_zebra.checkpoint.catalog import RETIRED, entries
    from megatron_zebra.checkpoint.verify import verify

    good, bad, half = [], [], 0
    for entry in entries(folder / "checkpoints"):
        if not entry.complete:
            half += not (entry.folder / RETIRED).exists()
        elif problems := verify(entry.folder):
            bad.append(f"{entry.folder.name}: {problems[0]}")
        else:
            good.append(entry.step)
    return good, bad, half


def turn_a_byte(folder: Path, chance: random.Random) -> int:
    """Damage the newest checkpoint; returns its step."""
    from megatron_zebra.checkpoint.catalog import newest
    from megatron_zebra.checkpoint.verify import verify

    place = newest(folder / "checkpoints")
    assert place is not None
    file = chance.choice(sorted(place.glob("*.bin")))
    data = file.read_bytes()
    while not verify(place):  # a byte between two tensors is no damage
        at = chance.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    return int(place.name.removeprefix("step-").partition(".")[0])


def train_and_kill(folder: Path, arguments: argparse.Namespace, chance: random.Random) -> str:
    """Start the run and kill it; says where the kill fell."""
    began, offset = time.monotonic(), len(log_of(folder))
    log = (folder.parent / "killed.log").open("ab")
    launcher = subprocess.Popen(command(folder, arguments.steps, arguments.stage), cwd=ROOT, stdout=log, stderr=log)
    if chance.random() < 0.15:
        time.sleep(chance.uniform(1, 10))
        kill_all(launcher)
        return "start-up"
    # A share of the steps that is left for each kill, then a moment within a step and its save.
    wanted = chance.randint(1, max(1, arguments.steps // arguments.kills))
    seen: set[object] = set()
    while len(seen) < wanted and launcher.poll() is None:
        time.sleep(0.01)
        if "resumed" in log_of(folder)[offset:] or not offset:
            records = lines(folder)
            seen |= {records[-1]["step"]} if records else set()
        if time.monotonic() - began > 300:
            kill_all(launcher)
            raise SystemExit(f"the run made no step within 300 s; see {log.name}")
    time.sleep(chance.uniform(0, 0.2))
    kill_all(launcher)
    return f"after {len(seen)} steps"


def log_of(folder: Path) -> str:
    file = folder / "logs" / "rank-00000.log"
    return file.read_text() if file.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default: 20)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of the run (default: 80)")
    parser.add_argument("--stage", type=int, default=1, choices=range(4), help="ZeRO stage (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    base.mkdir(parents=True, exist_ok=True)
    whole, killed = base / "whole", base / "killed"
    chance = random.Random(arguments.seed)

    began = time.monotonic()
    run_to_the_end(whole, arguments)
    print(f"uninterrupted: {arguments.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    faults: list[str] = []
    good: list[int] = []
    hit_saves = turned = 0
    turned_at: int | None = None
    for kill in range(1, arguments.kills + 2):
        offset = len(log_of(killed))
        if kill > arguments.kills:
            run_to_the_end(killed, arguments)
            where = "to the end"
        else:
            where = train_and_kill(killed, arguments, chance)
        resumed = re.search(r"resumed .* at step (\d+)", log_of(killed)[offset:])
        began_at = int(resumed[1]) if resumed else 0 if where != "start-up" else None
        if began_at is not None and began_at != max(good, default=0):
            faults.append(
                f"start {kill} began at step {began_at}, the newest good checkpoint was {max(good, default=0)}"
            )
        good, bad, half = inspect(killed)
        bad = [line for line in bad if turned_at is None or not line.startswith(f"step-{turned_at:08d}")]
        faults += [f"after kill {kill}: an index over damage: {line}" for line in bad]
        hit_saves += half > 0 and kill <= arguments.kills
        note = ""
        if kill % 5 == 0 and kill <= arguments.kills and len(good) > 1:
            turned_at = turn_a_byte(killed, chance)
            good.remove(turned_at)
            turned, note = turned + 1, f"; a byte of step {turned_at} turned"
        print(
            f"{kill:2d}: began at {began_at}, {where}; good checkpoints {good}, half-written {half}{note}", flush=True
        )
    faults += differences(lines(whole), lines(killed))
    print(
        f"{arguments.kills} kills, {hit_saves} of them within a save; {turned} checkpoints damaged by hand, none of them loaded"
    )
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(lines(killed))} lines of metrics.jsonl {'DIFFER' if faults else 'equal bit for bit'} ({base})")
    return 1 if faults else 0


def run_to_the_end(folder: Path, arguments: argparse.Namespace) -> None:
    result = subprocess.run(command(folder, arguments.steps, arguments.stage), cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])


def differences(want: list[dict[str, object]], got: list[dict[str, object]]) -> list[str]:
    """The first line that is not the same."""
    for a, b in zip(want, got):
        if a != b:
            return [f"step {a['step']}: {b} for {a}"]
    return [] if len(want) == len(got) else [f"{len(got)} lines for {len(want)}"]


if __name__ == "__main__":
    sys.exit(main())
