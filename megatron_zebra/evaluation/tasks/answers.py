"""Of conversations the share of answers that greedy decoding would get exactly right, by length and depth."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import add_model, add_output, count, write_result

if TYPE_CHECKING:
    from megatron_zebra.evaluation.subject import Subject


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    options(task)
    add_output(task, "answers.json", ", a picture beside it")


def options(task: argparse.ArgumentParser) -> None:
    """What is asked, whatever model it is."""
    task.add_argument(
        "--data", required=True, type=Path, metavar="F", help="chat JSON lines, as of tools/build_long_qa.py"
    )
    task.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="DIR",
        help="Hugging Face folder with tokenizer.json and template",
    )
    task.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the tokenizer's")
    task.add_argument("--examples", type=count, metavar="N", help="conversations at most, evenly spread (default: all)")
    task.add_argument("--depth-bins", type=count, default=10, metavar="N", help="columns of the table (default: 10)")


def check(arguments: argparse.Namespace) -> None:
    """UserError for what is wrong whatever the model is."""
    if not arguments.data.exists():
        raise UserError(f"{arguments.data}: no such file")
    from megatron_zebra.data.chat_template import ChatTemplate

    ChatTemplate(arguments.tokenizer, arguments.chat_template)


def rehearse(arguments: argparse.Namespace, vocab_size: int) -> None:
    """UserError for what ``measure`` would find wrong with the conversations, for a model of ``vocab_size``."""
    from megatron_zebra.data.chat_template import ChatTemplate
    from megatron_zebra.evaluation.answers import read_examples

    read_examples(arguments.data, ChatTemplate(arguments.tokenizer, arguments.chat_template), vocab_size)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    from megatron_zebra.evaluation.load import opened

    with opened(arguments, "answers.json") as (subject, source, output):
        result = measure(subject, arguments)
        if subject.grid.is_main:
            print(f"checkpoint {source.folder}")
            print_table(result)
            write_result({"checkpoint": str(source.folder), "data": str(arguments.data), **result}, output)
            print(f"written to {output}")
            draw_maps({arguments.data.stem: result}, output.with_suffix(".png"))


def measure(subject: "Subject", arguments: argparse.Namespace) -> dict[str, Any]:
    """``evaluation.answers.tables`` of the conversations, the same on all ranks."""
    from tqdm import tqdm

    from megatron_zebra.data.chat_template import ChatTemplate
    from megatron_zebra.evaluation.answers import judge_together, read_examples, tables

    assert subject.decoder is not None
    grid, template = subject.grid, ChatTemplate(arguments.tokenizer, arguments.chat_template)
    examples = read_examples(arguments.data, template, subject.arch.vocab_size)
    if arguments.examples is not None and arguments.examples < len(examples):
        examples = [examples[n * len(examples) // arguments.examples] for n in range(arguments.examples)]
    total = len(range(grid.data.rank, len(examples), grid.data.size))
    with tqdm(total=total, desc="answers", unit="example", disable=None if grid.is_main else True, leave=None) as bar:
        found = judge_together(subject.decoder, examples, grid, bar.update)
    return tables(examples, found, arguments.depth_bins)


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What goes into metrics and tables: the share of exact answers, in all and by length."""
    by_length = {f"exact/{length}": of["exact"] for length, of in result["by_length"].items()}
    return {"exact": result["all"]["exact"], **by_length}


def print_table(result: dict[str, Any]) -> None:
    """A row a length, a column a depth; in per cent."""
    edges = result["depth_edges"]
    heads = [f"{edge:.2g}" for edge in edges[:-1]]
    print("exact answers, %, by tokens and by depth from")
    print(f"{'tokens':>8} {'all':>5} {'asked':>6}  {' '.join(f'{head:>5}' for head in heads)}")
    for length, cells in zip(result["lengths"], result["exact"]):
        whole = result["by_length"][str(length)]
        shares = " ".join("    -" if cell is None else f"{100 * cell:5.0f}" for cell in cells)
        print(f"{length:8d} {100 * whole['exact']:5.1f} {whole['asked']:6d}  {shares}")
    whole = result["all"]
    print(
        f"{'all':>8} {100 * whole['exact']:5.1f} {whole['asked']:6d}  loss {whole['loss']:.4f} a token of the answers"
    )
    for kind, of_kind in result["by_kind"].items():
        print(f"{kind:>8} {100 * of_kind['exact']:5.1f} {of_kind['asked']:6d}")


def draw_maps(results: dict[str, Any], picture: Path) -> None:
    """A heat map of each result, by name."""
    from megatron_zebra.report.answers import write_answers

    try:
        print(f"picture in {write_answers(results, picture)}")
    except OSError as error:  # the result is there: no picture is no failure
        print(f"warning: no picture: {error}", file=sys.stderr)
