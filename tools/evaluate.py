#!/usr/bin/env python
"""Judge a trained model.

perplexity: loss of held-out data, in all and by position in the document, and bits per byte.

  python tools/evaluate.py perplexity --checkpoint runs/quickstart --data data/valid
  torchrun --nproc-per-node 2 tools/evaluate.py perplexity --checkpoint runs/x --data a b --sequence-length 32768
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
    return top


def main() -> None:
    arguments = parser().parse_args()
    for name in ("sequence_length", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not arguments.checkpoint.exists():
        raise UserError(f"--checkpoint {arguments.checkpoint}: no such file or folder")
    perplexity(arguments)


def perplexity(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from megatron_zebra.convert.load import load_decoder
    from megatron_zebra.convert.source import open_model
    from megatron_zebra.data.indexed import IndexedPair
    from megatron_zebra.data.rows import OnePass
    from megatron_zebra.data.source import FileSource, check_vocabulary
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
            rows = OnePass(source, length, arguments.rows)
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
