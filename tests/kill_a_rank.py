#!/usr/bin/env python
"""Kill one rank of four in each kind of group, see the others end and name it, and go on with fewer processes.

    python tests/kill_a_rank.py

Real training of launch/recipes/debug.yaml, by torchrun and by a plain environment as srun gives it. Prints a table; exit
code 0 if every run ended within 60 s with the dead rank's name and where the others were, and went on from its checkpoint.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.processes import Run, train_and_kill

SETTINGS = {"data.sequence_length": 384, "training.global_batch_size": 12, "checkpoint.interval": 3}
# Layout on four processes, the rank to kill, and the processes and layout to go on with.
CASES: list[tuple[dict[str, int], int, int, dict[str, int]]] = [
    ({}, 2, 3, {}),
    ({"tp": 2}, 1, 2, {"tp": 2}),
    ({"cp": 2}, 3, 3, {"cp": 3}),
    ({"pp": 2}, 2, 2, {"pp": 2}),
    ({"tp": 2, "pp": 2}, 0, 3, {}),
]


def words(axes: dict[str, int], steps: int) -> list[str]:
    """The command line after pretrain_zebra.py, but for the run folder."""
    settings = SETTINGS | {"training.steps": steps} | {f"parallel.{name}": size for name, size in axes.items()}
    return [
        "--config",
        "launch/recipes/debug.yaml",
        *(w for key, value in settings.items() for w in (f"--{key}", str(value))),
    ]


def kill_and_go_on(
    axes: dict[str, int], victim: int, fewer: int, after: dict[str, int], folder: Path, torchrun: bool
) -> str:
    """What was seen, in words; an AssertionError if it is not as it should be."""
    run_dir = folder / "run"
    ends = train_and_kill(words(axes, 100_000), 4, victim, 5, folder, torchrun=torchrun)
    text = "\n".join(end.stderr for end in ends)
    told = re.findall(rf"error: rank {victim} \(pp \d.*?\).* has died.*?this rank \(rank \d\) was in (.*)", text)
    assert told, text[-3000:]
    assert "/megatron_zebra/" not in text, text[-3000:]  # no traceback of ours (torchrun prints one of its own)
    step = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    more = Run([*words(after, step + 2), "--logging.run_dir", str(run_dir)], fewer, folder, torchrun=torchrun)
    ends = more.wait(300)
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.stderr for end in ends)[-3000:]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))
    return f"{max(end.seconds for end in ends):5.1f} s  at step {step}  {told[0]}"


def main() -> int:
    failed = 0
    for torchrun in (True, False):
        for axes, victim, fewer, after in CASES:
            title = f"{'torchrun' if torchrun else 'plain':9}{axes or 'dp 4'!s:21}rank {victim} -> {fewer} x {after or 'dp'!s:10}"
            with tempfile.TemporaryDirectory() as folder:
                try:
                    print(title, kill_and_go_on(axes, victim, fewer, after, Path(folder), torchrun), flush=True)
                except AssertionError as error:
                    failed += 1
                    print(title, f"FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
