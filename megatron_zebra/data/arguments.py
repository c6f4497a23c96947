"""The command-line options of tools that read text."""

import argparse
from pathlib import Path

from megatron_zebra.data.inputs import InputOptions
from megatron_zebra.errors import UserError


def output_name(text: str) -> Path:
    """What an option names as a file to write. Path drops a "/" at the end, and files would appear beside the folder meant."""
    if text.rpartition("/")[2] in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"'{text}' ends without a name for the file; allowed is FOLDER/NAME")
    return Path(text)


def check_picture(output: Path) -> None:
    """That --output names a picture of a kind that is drawn."""
    if output.suffix not in (".png", ".svg"):
        raise UserError(f"--output {output}: must end in .png or .svg")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """How inputs are read."""
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text", "parquet"),
        default="auto",
        help="of all inputs (default: by the name of each)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of a JSON line, or column of a Parquet file (default: %(default)s)",
    )
    parser.add_argument(
        "--split-documents",
        choices=("file", "line", "blank-line"),
        default="file",
        help="what a document is in plain text: a file, a line, or what lies between blank lines (default: %(default)s)",
    )
    parser.add_argument(
        "--glob",
        default="*",
        metavar="PATTERN",
        help="which files of a folder, at any depth (default: all but hidden ones)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out and count documents that are not UTF-8 or not JSON, instead of stopping",
    )


def input_options(args: argparse.Namespace) -> InputOptions:
    """The parsed options as the library takes them."""
    return InputOptions(args.format, args.text_key, args.split_documents, args.glob)
