"""Loss of held-out data: in all, by position, by document, in bits per byte; at several lengths, whole or sliding.

Rows are S tokens of the data one after another, documents apart from each other, cut where a row ends (conversations are
kept whole). With --stride N each document is read in windows of S tokens, every one N tokens after the one before, and each
token counts once, in the first window that has it: the usual sliding-window perplexity. Under torchrun the copies of the
model share the rows out; --tp, --cp and --pp divide a model or a row that one device cannot hold.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_zebra.config.derived import sequence_multiple
from megatron_zebra.config.sections import Parallel
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import add_model, add_output, count, home_of, write_result

if TYPE_CHECKING:
    from megatron_zebra.data.source import FileSource
    from megatron_zebra.evaluation.loss import Evaluated
    from megatron_zebra.evaluation.subject import Subject

_SHOWN = 5  # worst and best documents that are printed


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    options(task)
    for axis, what in (("tp", "layer"), ("cp", "row"), ("pp", "stack of layers")):
        task.add_argument(f"--{axis}", type=count, default=1, metavar="N", help=f"processes that share a {what}")
    add_output(task, "perplexity.json")


def options(task: argparse.ArgumentParser) -> None:
    """What is measured, whatever model it is."""
    task.add_argument(
        "--data", required=True, nargs="+", metavar="P", help="prefixes of indexed pairs, each evaluated on its own"
    )
    task.add_argument(
        "--sequence-length",
        type=count,
        nargs="+",
        default=[2048],
        metavar="S",
        help="tokens a row; each length given is evaluated (default: 2048)",
    )
    task.add_argument(
        "--stride", type=count, metavar="N", help="sliding windows, each N tokens after the one before (default: whole)"
    )
    task.add_argument("--rows", type=count, metavar="N", help="rows of each set at most, evenly spread (default: all)")
    task.add_argument("--by-document", action="store_true", help="also the loss of each document, the worst first")


def check(arguments: argparse.Namespace) -> None:
    """UserError for what is wrong whatever the model is."""
    multiple = sequence_multiple(Parallel(tp=arguments.tp, cp=arguments.cp))
    for length in arguments.sequence_length:
        if length % multiple:
            near = [number for number in (length // multiple * multiple, -(-length // multiple) * multiple) if number]
            raise UserError(
                f"--sequence-length {length}: must be a multiple of {multiple} under tp {arguments.tp} and cp {arguments.cp} "
                f"(nearest: {' or '.join(map(str, near))})"
            )
        if arguments.stride is not None and arguments.stride > length:
            raise UserError(f"--stride {arguments.stride}: must not be above --sequence-length {length}")
    _pairs(arguments)


def rehearse(arguments: argparse.Namespace, vocab_size: int) -> None:
    """UserError for what ``measure`` would find wrong with its data, for a model of ``vocab_size``."""
    for pair in _pairs(arguments).values():
        for length in arguments.sequence_length:
            _opened(pair, arguments, length, vocab_size)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    from megatron_zebra.convert.kept import tokenizer_hashes
    from megatron_zebra.data.source import other_tokenizer
    from megatron_zebra.evaluation.load import opened

    with opened(arguments, "perplexity.json", max(arguments.sequence_length)) as (subject, source, output):
        if subject.grid.is_main:
            beside = tokenizer_hashes(source.folder)
            for pair in _pairs(arguments).values():
                for warning in filter(None, (other_tokenizer(pair, beside), _short(pair, arguments.sequence_length))):
                    print(f"warning: {warning}", file=sys.stderr)
        result = measure(subject, arguments)
        if subject.grid.is_main:
            # Print first: what was computed is not lost where it cannot be written.
            print(f"checkpoint {source.folder}\n{told(result)}")
            write_result({"checkpoint": str(source.folder), **result}, output)
            print(f"written to {output}")
            run = home_of(source.folder)
            if not arguments.output and (run / "metrics.jsonl").exists():
                _draw(run)


def measure(subject: "Subject", arguments: argparse.Namespace) -> dict[str, Any]:
    """{"stride": N, "sets": {name: losses}}, the same on all ranks."""
    sets = {}
    for name, pair in _pairs(arguments).items():
        for length in arguments.sequence_length:
            title = name if len(arguments.sequence_length) == 1 else f"{name} at {length}"
            sets[title] = _measure(subject, arguments, title, pair, length)
    return {"stride": arguments.stride, "sets": sets}


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What goes into metrics and tables: the loss of each set, and bits per byte where they are known."""
    found = {}
    for name, values in result["sets"].items():
        found[f"{name}/loss"] = values["loss"]
        if values["bits_per_byte"] is not None:
            found[f"{name}/bits_per_byte"] = values["bits_per_byte"]
    return found


def told(result: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for name, values in result["sets"].items():
        bits = f", {values['bits_per_byte']:.3f} bits a byte" if values["bits_per_byte"] is not None else ""
        lines.append(
            f"{name}: loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}{bits}, {values['targets']} targets"
        )
        of = values.get("documents", [])
        shown = of if len(of) <= 2 * _SHOWN else [*of[:_SHOWN], None, *of[-_SHOWN:]]
        lines += [
            f"  document {one['document']:>8}: loss {one['loss']:.4f}, {one['targets']} targets" if one else "  ..."
            for one in shown
        ]
    return "\n".join(lines)


def _pairs(arguments: argparse.Namespace) -> dict[str, IndexedPair]:
    """The data sets by name."""
    names = [Path(prefix).name for prefix in arguments.data]
    if len(set(names)) < len(names):
        names = arguments.data  # sets of one name, in different folders
    return {name: IndexedPair(prefix) for name, prefix in zip(names, arguments.data)}


def _short(pair: IndexedPair, lengths: list[int]) -> str | None:
    """A warning, where a context is longer than any text."""
    longest = int(np.diff(pair.document_starts(0, pair.documents + 1)).max(initial=0))
    above = [str(length) for length in sorted(lengths) if length > longest]
    if not above:
        return None
    return (
        f"{pair.prefix}: its longest document has {longest} tokens, fewer than --sequence-length {' '.join(above)}; nothing is "
        "judged with more context than that"
    )


def _opened(
    pair: IndexedPair, arguments: argparse.Namespace, length: int, vocab_size: int, multiple: int = 1
) -> tuple["FileSource", int, str | None]:
    """The data, the tokens of its rows, and a warning to print."""
    from megatron_zebra.data.source import FileSource, check_fits, check_vocabulary

    warning = check_vocabulary(pair, vocab_size)
    source = FileSource(pair, None, vocab_size if pair.info is None else None)
    length = min(length, -(-source.tokens // multiple) * multiple)  # more would be padding alone
    if arguments.stride is None:
        check_fits(source, length)
    return source, length, warning


def _measure(
    subject: "Subject", arguments: argparse.Namespace, title: str, pair: IndexedPair, length: int
) -> dict[str, Any]:
    from tqdm import tqdm

    from megatron_zebra.data.rows import OnePass
    from megatron_zebra.data.source import is_masked
    from megatron_zebra.evaluation.loss import evaluate

    grid, vocab_size = subject.grid, subject.arch.vocab_size
    source, length, warning = _opened(pair, arguments, length, vocab_size, subject.length_multiple)
    if warning and grid.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    rows = OnePass(source, length, arguments.rows, whole_documents=is_masked(source), stride=arguments.stride)
    total = -(-len(rows) // grid.dp_size)
    with tqdm(total=total, desc=title, unit="row", disable=None if grid.is_main else True, leave=None) as bar:
        result = evaluate(
            subject.runner,
            rows,
            1,
            grid,
            subject.context,
            bar.update,
            source.documents if arguments.by_document else 0,
        )
    if not result.targets:
        raise UserError(
            f"--data {pair.prefix}: has no target: no document of two tokens, or a mask that leaves out all"
        )
    found = {
        "sequence_length": length,
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700.0)),
        "targets": result.targets,
        "edges": result.edges,
        "loss_by_position": result.by_position(),
        "bits_per_byte": _bits_per_byte(result.loss, pair, vocab_size),
    }
    return found | ({"documents": _documents(result)} if arguments.by_document else {})


def _documents(result: "Evaluated") -> list[dict[str, Any]]:
    """Those that have a target, the worst first."""
    sums = zip(result.document_losses, result.document_targets)
    found = [
        {"document": number, "loss": loss / targets, "targets": targets}
        for number, (loss, targets) in enumerate(sums)
        if targets
    ]
    return sorted(found, key=lambda one: -one["loss"])


def _bits_per_byte(loss: float, pair: Any, vocab_size: int) -> float | None:
    """Of the whole text, at the mean loss; a document's first token, which nothing predicts, counts log2(vocabulary)."""
    if pair.info is None or not pair.info.text_bytes:
        return None
    predicted = pair.tokens.size - pair.documents
    return (loss / math.log(2) * predicted + math.log2(vocab_size) * pair.documents) / pair.info.text_bytes


def _draw(run: Path) -> None:
    from megatron_zebra.report.plots import write_plots

    try:
        print(f"pictures in {write_plots(run)[-1].parent}")
    except (UserError, OSError) as error:  # the result is there: no picture is no failure
        print(f"warning: no pictures: {error}", file=sys.stderr)
