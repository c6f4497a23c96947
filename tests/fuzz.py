#!/usr/bin/env python
"""Read thousands of damaged files; each must be read rightly or refused in one clear line.

    python tests/fuzz.py [--inputs 10000] [--seed 0] [--kind idx|index|config|...|all]
    python tests/fuzz.py --kind config --input 123        # one of them, with its traceback

Kinds: idx (a pair's .idx), pair (the files beside it), index (a checkpoint's index, lists of pieces and data), config
(configuration and command line, as far as the dry run), huggingface (config.json and safetensors), gguf, lines
(conversations, documents, metrics). Every input follows from kind, seed and number. A fault is anything but a right result
or a UserError that names the file or key: another exception, a wrong value, more than 20 s, more than 1 GiB, a dead
process. Prints a table and each fault; exit code 0 if there are none, 1 otherwise. Not collected by pytest (tests/test_fuzz.py
runs a few hundred inputs).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fuzzing.run import KINDS, Fault, Place, many, outcome_of

SHOWN = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="of each kind (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of all damage (default: 0)")
    parser.add_argument("--kind", default="all", choices=(*KINDS, "all"), help="what to damage (default: all)")
    parser.add_argument("--input", type=int, help="run only this input, and show how it ends")
    arguments = parser.parse_args()
    kinds = [*KINDS] if arguments.kind == "all" else [arguments.kind]
    if arguments.input is not None:
        return run_one(KINDS[kinds[0]], arguments.seed, arguments.input)
    print("kind          inputs  as before  otherwise sound  refused  faults  inputs/s  slowest  memory", flush=True)
    faults = 0
    for kind in kinds:
        tally = many(KINDS[kind], arguments.seed, arguments.inputs)
        counts = tally.counts
        print(
            f"{kind:12}{counts.total():8d}{counts['same']:11d}{counts['other']:17d}{counts['refused']:9d}{counts['fault']:8d}"
            f"{counts.total() / tally.seconds:10.0f}{tally.slowest[0]:8.2f}s{tally.megabytes:5.0f} MB",
            flush=True,
        )
        faults += counts["fault"]
        for what, numbers in _grouped(tally.faults)[:SHOWN]:
            print(f"    FAULT {len(numbers)} x, input {numbers[0]}: {what}", flush=True)
    return 1 if faults else 0


def run_one(place: Place, seed: int, number: int) -> int:
    """One input in this process; prints its outcome, or all that is known of a fault."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        subject = place.subject()
        outcome = outcome_of(subject, subject.prepare(Path(name)), Path(name), seed, number)
    print(f"{outcome.what}\n{outcome.details}" if isinstance(outcome, Fault) else outcome)
    return int(isinstance(outcome, Fault))


def _grouped(faults: list[Fault]) -> list[tuple[str, list[int]]]:
    """The first line and the inputs of all faults of one kind and place, the commonest first."""
    groups: dict[str, list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.what.split(": ")[0], []).append(fault)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [(group[0].what, [fault.number for fault in group]) for group in ordered]


if __name__ == "__main__":
    sys.exit(main())
