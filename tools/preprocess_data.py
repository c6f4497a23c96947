"""Turn text into the indexed pair that training reads: P.bin, P.idx and P.json."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_zebra.data.arguments import add_input_options, input_options, output_name
from megatron_zebra.errors import UserError, run_tool

EXAMPLES = """
examples:
  a folder of files, each a document:
    python tools/preprocess_data.py --input src/ --glob '*.py' --tokenizer tok.model --output-prefix data/code --workers 8
  JSON lines, compressed, the text under "content":
    python tools/preprocess_data.py --input a.jsonl.gz b.jsonl.zst --text-key content --tokenizer tokenizer.json --output-prefix data/web
  plain text with blank lines between documents:
    python tools/preprocess_data.py --input book.txt --split-documents blank-line --tokenizer tok.model --output-prefix data/book
  conversations, JSON lines of {"messages": [{"role": ..., "content": ...}, ...]}, by the tokenizer's own chat template; P.loss
  says which tokens the assistant says, and only they count in the loss:
    python tools/preprocess_data.py --chat --input chat.jsonl --tokenizer smollm2/ --output-prefix data/chat --max-length 4096 --too-long drop

The format follows the name: .jsonl .ndjson .json = JSON lines, .parquet .pq = Parquet, others = plain text; each also .gz or .zst.
The files appear under their names when all is complete; the order of documents does not depend on --workers.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="F",
        help="SentencePiece .model or Hugging Face tokenizer.json, or the folder of either",
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
    chat = parser.add_argument_group("conversations")
    chat.add_argument("--chat", action="store_true", help="inputs are conversations, one a JSON line")
    chat.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the tokenizer's")
    chat.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a conversation may have (default: any number)"
    )
    chat.add_argument(
        "--too-long",
        choices=("error", "drop", "truncate"),
        help="what becomes of a conversation above --max-length: stop, leave it out, or cut its end off (default: error)",
    )
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
    from megatron_zebra.data.encode import Job
    from megatron_zebra.data.preprocess import preprocess

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
        chat=chat_options(args),
    )
    report = preprocess(job)
    info = report.info
    if job.chat is None:
        what = f".json: {info.documents:,} documents, {info.tokens:,} tokens ({info.text_bytes / info.tokens:.2f} bytes of text each)"
    else:
        what = f".json, .loss: {info.documents:,} conversations, {info.tokens:,} tokens, {info.loss_tokens:,} of them in the loss"
    print(f"{args.output_prefix}.bin, .idx, {what}, {report.seconds:.1f} s")
    if report.empty:
        print(f"{report.empty:,} empty documents were left out")
    if report.bad:
        print(f"{report.bad:,} unreadable documents were left out, the first: {report.first_bad}")
    if args.max_length:
        print(
            f"of more than {args.max_length:,} tokens: {report.dropped:,} conversations were left out, {report.truncated:,} cut"
        )


def chat_options(args: argparse.Namespace) -> Any:
    """The options of conversations, None for texts; UserError for one that would do nothing."""
    from megatron_zebra.data.encode import ChatOptions

    given = [name for name in ("chat_template", "max_length", "too_long") if getattr(args, name) is not None]
    if given and not args.chat:
        raise UserError(f"--{given[0].replace('_', '-')}: is for conversations; give --chat too")
    if not args.chat:
        return None
    if args.max_length is not None and args.max_length < 1:
        raise UserError(f"--max-length {args.max_length}: must be 1 or more")
    if args.too_long is not None and args.max_length is None:
        raise UserError(f"--too-long {args.too_long}: says what is too long by --max-length; give that too")
    return ChatOptions(args.chat_template, args.max_length, args.too_long or "error")


if __name__ == "__main__":
    run_tool(main)
