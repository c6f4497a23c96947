"""What the global layers are for: a small Zebra and the same model with all layers local learn to find a passkey in a text.

  python benchmarks/passkey.py                     # about 40 minutes on two cores, a training on each
  python benchmarks/passkey.py --output passkey --steps 300

Both train on the same texts of 64 to 1024 tokens, the standard library's sources with a number stated at any depth, and are
judged by the answer alone, as tools/evaluate.py retrieval asks for it. Information moves at most window_size tokens a
layer through local layers: beyond num_layers * window_size the second model cannot know the number.

Prints tables, and leaves the runs, the results and a heat map of each in --output.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.quickstart import corpus
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.evaluation.retrieval.build import HEAD, frame_of, make_example
from megatron_zebra.evaluation.retrieval.haystack import open_haystack
from megatron_zebra.evaluation.retrieval.tasks import Counts

ROOT = Path(__file__).resolve().parent.parent
LONGEST, SHORTEST, WINDOW, LAYERS = 1024, 64, 32, 4
PHASES = {
    "short": (160, 0.5, "wsd"),
    "long": (LONGEST, 0.5, "cosine"),
}  # longest text, share of the steps, learning rate: short ones hold more answers
LENGTHS = (64, 96, 128, 160, 192, 256, 512, 1024)
ROWS = 4
TRAINING_SEED = 1  # the evaluation's is 0
MODELS = {"zebra": "global, local, global, local", "local": "local, local, local, local"}
SETTINGS = {
    "model.hidden_size": 128,
    "model.num_layers": LAYERS,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.ffn_hidden_size": 384,
    "model.window_size": WINDOW,
    "model.init_std": 0.08,
    "model.rope.theta": 1e6,
    "data.sequence_length": LONGEST,
    "data.packing": "best_fit",
    "training.global_batch_size": ROWS,
    "training.micro_batch_size": 1,
    "training.precision": "fp32",
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 100,
    "checkpoint.interval": 500,
    "checkpoint.keep_last": 1,
    "evaluation.interval": 0,
    "logging.interval": 50,
}


def tool(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def prepare(folder: Path, steps: int) -> None:
    """Texts, a tokenizer whose vocabulary has the task's words, and the training pair."""
    corpus(folder)
    task = f"{HEAD}The pass key is 1. Remember it.\n\nWhat is the pass key?\nThe pass key is 2"
    (folder / "task.txt").write_text(f"{task}\n" * 20_000)
    tool(
        "tools/train_tokenizer.py", "--input", folder / "train.jsonl", folder / "task.txt", "--vocab-size", 1024,
        "--output", folder / "tokenizer.model", "--force",
    )  # fmt: skip
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.hash, tokenizer.kind, tokenizer.name)
    haystack = open_haystack([str(folder / "train.jsonl")], tokenizer, LONGEST, False)
    frame, generator = frame_of(tokenizer, None, bos=True), np.random.default_rng(TRAINING_SEED)
    for phase, (longest, share, _) in PHASES.items():
        with PairWriter(folder / phase, vocabulary, force=True, masked=True) as writer:
            while writer.tokens < share * steps * ROWS * LONGEST:
                length = int(SHORTEST * (longest / SHORTEST) ** generator.random())
                example = make_example(
                    "passkey", writer.documents, length, 0, 1, haystack=haystack, tokenizer=tokenizer, frame=frame,
                    counts=Counts(), seed=TRAINING_SEED,
                )  # fmt: skip
                mask = np.zeros(length, np.uint8)
                for start, stop in example.turns:
                    mask[start:stop] = 1
                writer.add(example.tokens, [length], mask=mask)
            writer.finish()


def train(folder: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    """Both phases of one model, one after the other, beside what else runs."""
    commands: list[str] = []
    load: list[str] = []
    for phase, (_, share, schedule) in PHASES.items():
        settings = SETTINGS | {
            "model.layer_kinds": f"[{MODELS[name]}]",
            "data.train": f"[{folder / phase}]",
            "data.tokenizer": folder / "tokenizer.model",
            "training.steps": int(share * steps),
            "optimizer.schedule": schedule,
            "logging.run_dir": folder / name / phase,
        }
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        commands.append(shlex.join([sys.executable, "pretrain_zebra.py", *words, *load]))
        load = ["--checkpoint.load", str(folder / name / phase), "--checkpoint.load_part", "weights"]
    return subprocess.Popen(" && ".join(commands), shell=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("passkey"))
    parser.add_argument("--steps", type=int, default=3600)
    options = parser.parse_args()
    folder = options.output.resolve()
    prepare(folder, options.steps)
    running = [train(folder, name, options.steps) for name in MODELS]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a training failed")
    for name, kinds in MODELS.items():
        print(f"\n{name}: {kinds}; window {WINDOW}, so {LAYERS * WINDOW} tokens through all layers", flush=True)
        tool(
            "tools/evaluate.py", "retrieval", "--checkpoint", folder / name / "long", "--text", folder / "valid.jsonl",
            "--tasks", "passkey", "--lengths", *LENGTHS, "--examples", 20, "--output", folder / f"{name}.json",
        )  # fmt: skip
    exact = {
        name: json.loads((folder / f"{name}.json").read_text())["tasks"]["passkey"]["by_length"] for name in MODELS
    }
    print("\nexact answers, %\n  tokens  " + "  ".join(MODELS))
    for length in LENGTHS:
        print(f"{length:8d}  " + "  ".join(f"{100 * exact[name][str(length)]['exact']:5.1f}" for name in MODELS))


if __name__ == "__main__":
    main()
