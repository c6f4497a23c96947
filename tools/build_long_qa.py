"""Make questions about facts planted in long texts: chat JSON lines that teach retrieval, or test it, at every depth."""

import argparse
import os
import signal
import sys
from pathlib import Path

from megatron_zebra.data.arguments import add_input_options, input_options, output_name
from megatron_zebra.errors import UserError, run_tool

EXAMPLES = """
examples:
  training data: 2000 texts of up to 1024, 2048 and 4096 tokens in turn, two questions about each
    python tools/build_long_qa.py --input books/ --tokenizer smollm2/ --lengths 1024 2048 4096 --examples 2000 --questions 2 --output data/qa.jsonl
  held-out data, from other documents and with other facts
    python tools/build_long_qa.py --input books/ --tokenizer smollm2/ --lengths 1024 2048 4096 --examples 150 --split valid --output data/qa-valid.jsonl

Then: tools/preprocess_data.py --chat for training, tools/evaluate.py answers for exact match by length and depth.
The same seed, inputs and numbers give the same file, whatever --workers is.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders of text"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folder with tokenizer.json and template",
    )
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the tokenizer's")
    parser.add_argument("--output", type=output_name, required=True, metavar="F", help="JSON lines to write")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        required=True,
        metavar="N",
        help="tokens of a conversation, template and answer included, at most; taken in turn",
    )
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="conversations (default: %(default)s)")
    parser.add_argument(
        "--questions",
        type=int,
        default=1,
        metavar="N",
        help="of a conversation, one after another (default: %(default)s)",
    )
    parser.add_argument(
        "--distractors",
        type=int,
        default=3,
        metavar="N",
        help="further facts of the same shape in the text (default: %(default)s)",
    )
    parser.add_argument(
        "--split", choices=("train", "valid"), default="train", help="which documents and facts (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=10,
        metavar="N",
        help="every N-th document is for --split valid alone; 0 = all inputs are of this split (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads that tokenize (default: one a core, here %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_input_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary file is removed
    for name, least in (
        ("examples", 1),
        ("questions", 1),
        ("distractors", 0),
        ("held_out", 0),
        ("seed", 0),
        ("workers", 1),
    ):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more")
    if args.held_out == 1:
        raise UserError("--held-out 1: leaves nothing for training; allowed are 0 and 2 or more")
    if min(args.lengths) < 64:
        raise UserError(f"--lengths {min(args.lengths)}: must be 64 tokens or more")
    from megatron_zebra.data.qa.build import LongQA
    from megatron_zebra.data.qa.write import QAJob, write_examples

    settings = LongQA(args.lengths, args.examples, args.questions, args.distractors, args.seed, args.split)
    job = QAJob(
        args.input,
        args.tokenizer,
        args.output,
        settings,
        input_options(args),
        args.chat_template,
        args.held_out,
        args.workers,
        args.skip_bad,
        args.force,
    )
    report = write_examples(job)
    print(
        f"{args.output}: {args.examples:,} conversations of {report.tokens / args.examples:,.0f} tokens on average, from "
        f"{report.documents:,} documents ({args.split}), {report.seconds:.1f} s"
    )
    if report.bad:
        print(f"{report.bad:,} unreadable documents were left out")


if __name__ == "__main__":
    run_tool(main)
