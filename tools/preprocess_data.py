"""Turn text into the indexed pair that training reads: P.bin, P.idx and P.json."""

import argparse
import os
import signal
import sys
from pathlib import Path

from megatron_zebra.data.arguments import add_input_options, input_options, output_name
from megatron_zebra.errors import run_tool

EXAMPLES = """
examples:
  a folder of files, each a document:
    python tools/preprocess_data.py --input src/ --glob '*.py' --tokenizer tok.model --output-prefix data/code --workers 8
  JSON lines, compressed, the text under "content":
    python tools/preprocess_data.py --input a.jsonl.gz b.jsonl.zst --text-key content --tokenizer tokenizer.json --output-prefix data/web
  plain text with blank lines between documents:
    python tools/preprocess_data.py --input book.txt --split-documents blank-line --tokenizer tok.model --output-prefix data/book

The format follows the name: .jsonl .ndjson .json = JSON lines, .parquet .pq = Parquet, others = plain text; each also .gz or .zst.
The files appear under their names when all is complete; the order of documents does not depend on --workers.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="F", help="SentencePiece .model or Hugging Face tokenizer.json"
    )
    parser.add_argument(
        "--output-prefix", type=output_name, required=True, metavar="P", help="writes P.bin, P.idx and P.json"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenize (default: one a core, here %(default)s)",
    )
    add_input_options(parser)
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the token that ends a document (default: the tokenizer's </s>, <|endoftext|>, ...)",
    )
    parser.add_argument("--no-eod", action="store_true", help="append no end-of-document token")
    parser.add_argument("--force", action="store_true", help="replace an existing pair")
    return parser.parse_args()


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    from megatron_zebra.data.preprocess import Job, preprocess

    job = Job(
        inputs=args.input,
        tokenizer=args.tokenizer,
        prefix=args.output_prefix,
        workers=args.workers,
        options=input_options(args),
        eod_token=args.eod_token,
        append_eod=not args.no_eod,
        skip_bad=args.skip_bad,
        force=args.force,
    )
    report = preprocess(job)
    info = report.info
    print(
        f"{args.output_prefix}.bin, .idx, .json: {info.documents:,} documents, {info.tokens:,} tokens "
        f"({report.text_bytes / info.tokens:.2f} bytes of text each), {report.seconds:.1f} s"
    )
    if report.empty:
        print(f"{report.empty:,} empty documents were left out")
    if report.bad:
        print(f"{report.bad:,} unreadable documents were left out, the first: {report.first_bad}")


if __name__ == "__main__":
    run_tool(main)
