#!/usr/bin/env python
"""Judge a trained model. Each task has a --help of its own.

  python tools/evaluate.py perplexity --checkpoint runs/quickstart --data data/valid
  torchrun --nproc-per-node 2 tools/evaluate.py perplexity --checkpoint runs/x --data a b --sequence-length 32768
  python tools/evaluate.py answers --checkpoint runs/tuned --data data/qa-valid.jsonl --tokenizer smollm2/

Under torchrun the processes share the work out.
"""

import argparse
from importlib import import_module
from typing import Any

from megatron_zebra.errors import UserError, run_tool
from megatron_zebra.evaluation.tasks.common import Parser

TASKS = {
    "perplexity": "loss by data set and by position, bits per byte",
    "answers": "exact match of answers by length and depth",
    "retrieval": "what is found again in long texts, by task, length and depth",
    "harness": "short-context tasks through lm-eval",
    "logits": "logits of given token ids, for comparing with other frameworks",
}


def parser() -> argparse.ArgumentParser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = top.add_subparsers(dest="task", required=True)
    for name, told in TASKS.items():
        module = task_module(name)
        task = tasks.add_parser(name, help=told, description=module.__doc__, formatter_class=top.formatter_class)
        module.arguments(task)
    return top


def task_module(name: str) -> Any:
    return import_module(f"megatron_zebra.evaluation.tasks.{name}")


def main() -> None:
    arguments = parser().parse_args()
    if hasattr(arguments, "checkpoint") and not arguments.checkpoint.exists():
        raise UserError(f"--checkpoint {arguments.checkpoint}: no such file or folder")
    task_module(arguments.task).run(arguments)


if __name__ == "__main__":
    run_tool(main)
