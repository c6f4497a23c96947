"""Loss of held-out data, in all and by position in the document, and bits per byte."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import (
    add_model,
    add_output,
    count,
    make_room,
    output_of,
    run_of,
    write_result,
)


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    task.add_argument(
        "--data", required=True, nargs="+", metavar="P", help="prefixes of indexed pairs, each evaluated on its own"
    )
    task.add_argument("--sequence-length", type=count, default=2048, metavar="S", help="tokens a row (default: 2048)")
    task.add_argument("--rows", type=count, metavar="N", help="rows of each set at most, evenly spread (default: all)")
    add_output(task, "perplexity.json")


def run(arguments: argparse.Namespace) -> None:
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
        output = output_of(arguments, folder, "perplexity.json")
        if grid.is_main:
            make_room(output)
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
            run = run_of(folder)
            if not arguments.output and (run / "metrics.jsonl").exists():
                _draw(run)


def _bits_per_byte(loss: float, pair: Any, vocab_size: int) -> float | None:
    """Of the whole text, at the mean loss; a document's first token, which nothing predicts, counts log2(vocabulary)."""
    if pair.info is None or not pair.info.text_bytes:
        return None
    predicted = pair.tokens.size - pair.documents
    return (loss / math.log(2) * predicted + math.log2(vocab_size) * pair.documents) / pair.info.text_bytes


def _report(document: dict[str, Any], output: Path) -> None:
    """Print first: what was computed is not lost where it cannot be written."""
    print(f"checkpoint {document['checkpoint']}")
    for name, values in document["sets"].items():
        bits = f", {values['bits_per_byte']:.3f} bits a byte" if values["bits_per_byte"] is not None else ""
        print(
            f"{name}: loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}{bits}, {values['targets']} targets"
        )
    write_result(document, output)
    print(f"written to {output}")


def _draw(run: Path) -> None:
    from megatron_zebra.report.plots import write_plots

    try:
        print(f"pictures in {write_plots(run)[-1].parent}")
    except (UserError, OSError) as error:  # the result is there: no picture is no failure
        print(f"warning: no pictures: {error}", file=sys.stderr)
