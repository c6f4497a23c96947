"""Of conversations the share of answers that greedy decoding would get exactly right, by length and depth."""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_zebra.evaluation.tasks.common import add_model, add_output, count, make_room, output_of, write_result


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
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
    add_output(task, "answers.json", ", a picture beside it")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from tqdm import tqdm

    from megatron_zebra.convert.load import load_decoder
    from megatron_zebra.convert.source import open_model
    from megatron_zebra.data.chat_template import ChatTemplate
    from megatron_zebra.evaluation.answers import Answered, judge, read_examples, tables
    from megatron_zebra.parallel.process import WorldCollective, sum_over, world

    template = ChatTemplate(arguments.tokenizer, arguments.chat_template)
    with world(arguments.device, 600.0) as grid:
        opened = open_model(arguments.checkpoint, WorldCollective(grid))
        folder = opened.folder
        output = output_of(arguments, folder, "answers.json")
        if grid.is_main:
            make_room(output)
        examples = read_examples(arguments.data, template, opened.architecture.vocab_size)
        if arguments.examples is not None and arguments.examples < len(examples):
            examples = [examples[n * len(examples) // arguments.examples] for n in range(arguments.examples)]
        dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
        model = load_decoder(opened, grid.device, dtype)
        part = slice(grid.dp_rank, None, grid.dp_size)
        total = len(range(len(examples))[part])
        with tqdm(total=total, desc="answers", unit="example", disable=None if grid.is_main else True) as bar:
            found = judge(model, examples, grid.device, part, bar.update)
        columns = [sum_over(column.tolist(), grid.device) for column in (found.exact, found.loss, found.tokens)]
        if grid.is_main:
            judged = Answered(*map(np.array, columns))
            result = tables(examples, judged, arguments.depth_bins)
            print(f"checkpoint {folder}")
            print_table(result)
            write_result({"checkpoint": str(folder), "data": str(arguments.data), **result}, output)
            print(f"written to {output}")
            draw_maps({arguments.data.stem: result}, output.with_suffix(".png"))


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
