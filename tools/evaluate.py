#!/usr/bin/env python
"""Judge a trained model.

perplexity: loss of held-out data, in all and by position in the document, and bits per byte.
answers: of conversations the share of answers that greedy decoding would get exactly right, by length and depth.

  python tools/evaluate.py perplexity --checkpoint runs/quickstart --data data/valid
  torchrun --nproc-per-node 2 tools/evaluate.py perplexity --checkpoint runs/x --data a b --sequence-length 32768
  python tools/evaluate.py answers --checkpoint runs/tuned --data data/qa-valid.jsonl --tokenizer smollm2/
"""

import argparse
import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError, run_tool


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = top.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("perplexity", help="loss by data set and by position, bits per byte")
    task.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a model: a checkpoint, a run folder (its newest good one), a Hugging Face folder, a GGUF file",
    )
    task.add_argument(
        "--data", required=True, nargs="+", metavar="P", help="prefixes of indexed pairs, each evaluated on its own"
    )
    task.add_argument("--sequence-length", type=int, default=2048, metavar="S", help="tokens a row (default: 2048)")
    task.add_argument("--rows", type=int, metavar="N", help="rows of each set at most, evenly spread (default: all)")
    task.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")
    task.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    task.add_argument(
        "--output", type=output_name, help="JSON file (default: evaluation/perplexity.json in the run folder)"
    )
    task = tasks.add_parser("answers", help="exact match of answers by length and depth")
    task.add_argument("--checkpoint", required=True, type=Path, help="a model, as for perplexity")
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
    task.add_argument("--examples", type=int, metavar="N", help="conversations at most, evenly spread (default: all)")
    task.add_argument("--depth-bins", type=int, default=10, metavar="N", help="columns of the table (default: 10)")
    task.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")
    task.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    task.add_argument(
        "--output",
        type=output_name,
        help="JSON file, a picture beside it (default: evaluation/answers.json in the run folder)",
    )
    return top


def main() -> None:
    arguments = parser().parse_args()
    for name in ("sequence_length", "rows", "examples", "depth_bins"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not arguments.checkpoint.exists():
        raise UserError(f"--checkpoint {arguments.checkpoint}: no such file or folder")
    {"perplexity": perplexity, "answers": answers}[arguments.task](arguments)


def perplexity(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from megatron_zebra.convert.load import load_decoder
    from megatron_zebra.convert.source import open_model
    from megatron_zebra.data.indexed import IndexedPair
    from megatron_zebra.data.rows import OnePass
    from megatron_zebra.data.source import FileSource, check_fits, check_vocabulary, is_masked
    from megatron_zebra.evaluation.loss import evaluate
    from megatron_zebra.parallel.process import WorldCollective, world
    from megatron_zebra.pipeline.runner import WholeModel

    names = [Path(prefix).name for prefix in arguments.data]
    if len(set(names)) < len(names):
        names = arguments.data  # sets of one name, in different folders
    pairs = {name: IndexedPair(prefix) for name, prefix in zip(names, arguments.data)}
    with world(arguments.device, 600.0) as grid:
        opened = open_model(arguments.checkpoint, WorldCollective(grid))
        arch, folder = opened.architecture, opened.folder
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        output = arguments.output or run / "evaluation" / "perplexity.json"
        if grid.is_main:
            _make_room(output)
        dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
        model = load_decoder(opened, grid.device, dtype)
        sets: dict[str, Any] = {}
        for name, pair in pairs.items():
            warning = check_vocabulary(pair, arch.vocab_size)
            if warning and grid.is_main:
                print(f"warning: {warning}", file=sys.stderr)
            source = FileSource(pair, None, arch.vocab_size if pair.info is None else None)
            length = min(arguments.sequence_length, source.tokens)  # more would be padding alone
            check_fits(source, length)
            rows = OnePass(source, length, arguments.rows, whole_documents=is_masked(source))
            with tqdm(
                total=-(-len(rows) // grid.dp_size), desc=name, unit="row", disable=None if grid.is_main else True
            ) as bar:
                result = evaluate(WholeModel(model), rows, 1, grid, None, bar.update)
            sets[name] = {
                "loss": result.loss,
                "perplexity": math.exp(min(result.loss, 700.0)),
                "targets": result.targets,
                "edges": result.edges,
                "loss_by_position": result.by_position(),
                "bits_per_byte": _bits_per_byte(result.loss, pair, arch.vocab_size),
            }
        if grid.is_main:
            _report({"checkpoint": str(folder), "sequence_length": arguments.sequence_length, "sets": sets}, output)
            if not arguments.output and (run / "metrics.jsonl").exists():
                _draw(run)


def answers(arguments: argparse.Namespace) -> None:
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
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        output = arguments.output or run / "evaluation" / "answers.json"
        if grid.is_main:
            _make_room(output)
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
            _print_answers(folder, result)
            _write({"checkpoint": str(folder), "data": str(arguments.data), **result}, output)
            _draw_answers({arguments.data.stem: result}, output.with_suffix(".png"))


def _print_answers(folder: Path, result: dict[str, Any]) -> None:
    """A row a length, a column a depth; in per cent."""
    print(f"checkpoint {folder}")
    edges = result["depth_edges"]
    heads = [f"{edge:g}" for edge in edges[:-1]]
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


def _draw_answers(results: dict[str, Any], picture: Path) -> None:
    from megatron_zebra.report.answers import write_answers

    try:
        print(f"picture in {write_answers(results, picture)}")
    except OSError as error:  # the result is there: no picture is no failure
        print(f"warning: no picture: {error}", file=sys.stderr)


def _bits_per_byte(loss: float, pair: Any, vocab_size: int) -> float | None:
    """Of the whole text, at the mean loss; a document's first token, which nothing predicts, counts log2(vocabulary)."""
    if pair.info is None or not pair.info.text_bytes:
        return None
    predicted = pair.tokens.size - pair.documents
    return (loss / math.log(2) * predicted + math.log2(vocab_size) * pair.documents) / pair.info.text_bytes


def _make_room(output: Path) -> None:
    """Find out before the work that its result could not be written."""
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _report(document: dict[str, Any], output: Path) -> None:
    """Print first: what was computed is not lost where it cannot be written."""
    print(f"checkpoint {document['checkpoint']}")
    for name, values in document["sets"].items():
        bits = f", {values['bits_per_byte']:.3f} bits a byte" if values["bits_per_byte"] is not None else ""
        print(
            f"{name}: loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}{bits}, {values['targets']} targets"
        )
    _write(document, output)


def _write(document: dict[str, Any], output: Path) -> None:
    temporary = output.with_name(output.name + ".tmp")
    with _writing(output):
        try:
            temporary.write_text(json.dumps(document, indent=2) + "\n")
            os.replace(temporary, output)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    print(f"written to {output}")


def _draw(run: Path) -> None:
    from megatron_zebra.report.plots import write_plots

    try:
        print(f"pictures in {write_plots(run)[-1].parent}")
    except (UserError, OSError) as error:  # the result is there: no picture is no failure
        print(f"warning: no pictures: {error}", file=sys.stderr)


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_tool(main)
