"""Train a SentencePiece tokenizer on text: F.model, which gives every text back exactly."""

import argparse
import os
from pathlib import Path

from megatron_zebra.data.arguments import add_input_options, input_options, output_name
from megatron_zebra.errors import run_tool

EXAMPLES = """
examples:
  on the Python files of a folder:
    python tools/train_tokenizer.py --input src/ --glob '*.py' --vocab-size 8192 --output tok.model
  on JSON lines, with tokens for chat:
    python tools/train_tokenizer.py --input web.jsonl.zst --vocab-size 32000 --output tok.model --control-symbols '<|im_start|>' '<|im_end|>'

Ids: 0 <unk>, 1 <s>, 2 </s> (ends a document), 3 <pad>, the control symbols, 256 bytes, pieces, characters.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens in all")
    parser.add_argument("--output", type=output_name, required=True, metavar="F.model", help="the file to write")
    add_input_options(parser)
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="kind (default: %(default)s)")
    parser.add_argument(
        "--sample-bytes",
        type=float,
        default=1e8,
        metavar="N",
        help="text trained on at most, drawn evenly from all of it; bounds the memory (default: 1e8)",
    )
    parser.add_argument(
        "--control-symbols", nargs="*", default=[], metavar="TOKEN", help="tokens that no text can contain, as for chat"
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="X",
        help="share of the characters that get a token; the others are bytes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the sample (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    from megatron_zebra.data.train_tokenizer import TokenizerJob, train_tokenizer

    print(f"training a {args.model} tokenizer of {args.vocab_size:,} tokens", flush=True)
    report = train_tokenizer(
        TokenizerJob(
            inputs=args.input,
            vocab_size=args.vocab_size,
            output=args.output,
            model=args.model,
            options=input_options(args),
            sample_bytes=args.sample_bytes,
            control_symbols=args.control_symbols,
            character_coverage=args.character_coverage,
            threads=len(os.sched_getaffinity(0)),
            seed=args.seed,
            skip_bad=args.skip_bad,
            force=args.force,
        )
    )
    print(
        f"{args.output}: {report.vocab_size:,} tokens, from {report.sampled_bytes / 1e6:.1f} of {report.text_bytes / 1e6:.1f} "
        f"MB of text, {report.bytes_per_token:.2f} bytes of text a token, {report.seconds:.1f} s"
    )
    if report.changed_blocks:
        print(
            f"{report.changed_blocks} of {report.blocks} blocks of text change (the character U+2581 becomes a space)"
        )


if __name__ == "__main__":
    run_tool(main)
