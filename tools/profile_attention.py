#!/usr/bin/env python
"""Measure how far back each layer of a model looks, to choose the layers that stay global.

For every layer the share of attention that falls on keys beyond a window is measured on real text, and drawn. What falls
on a document's first tokens is left aside when layers are chosen: softmax puts there what it has no use for.

  python tools/profile_attention.py --checkpoint SmolLM2-135M --data data/novels --windows 256 512 1024 --keep 8
  python tools/convert_checkpoint.py from-hf --hf SmolLM2-135M --output zebra --window-size 512 --pattern 0,4,9,...
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError, run_tool


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--checkpoint", required=True, type=Path, help="a training checkpoint, run or Hugging Face folder")
    top.add_argument("--data", required=True, metavar="P", help="prefix of an indexed pair with long documents")
    top.add_argument("--sequence-length", type=int, default=4096, metavar="S", help="tokens a row (default: 4096)")
    top.add_argument("--rows", type=int, default=4, metavar="N", help="rows read, evenly spread (default: 4)")
    top.add_argument(
        "--windows", type=int, nargs="+", default=[256, 512, 1024], metavar="W", help="windows (default: 256 512 1024)"
    )
    top.add_argument("--window", type=int, metavar="W", help="the one that layers are chosen by (default: the first)")
    top.add_argument("--keep", type=int, metavar="N", help="layers to keep global (default: a quarter)")
    top.add_argument("--sinks", type=int, default=4, metavar="N", help="first tokens left aside (default: 4)")
    top.add_argument("--every", type=int, default=8, metavar="N", help="measure every so many tokens (default: 8)")
    top.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")
    top.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    top.add_argument(
        "--output", type=output_name, default=Path("attention_profile"), help="PATH of PATH.json and PATH.png"
    )
    return top


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    for name in ("sequence_length", "rows", "sinks", "every", "keep", "window"):
        value, least = getattr(arguments, name), 0 if name == "sinks" else 1
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    arguments.windows = sorted({*arguments.windows, *([arguments.window] if arguments.window else [])})
    arguments.window = arguments.window or arguments.windows[0]
    if arguments.windows[0] < 1:
        raise UserError(f"--windows {arguments.windows[0]}: must be 1 or more")
    if arguments.windows[-1] + 1 >= arguments.sequence_length:
        raise UserError(
            f"--windows {arguments.windows[-1]}: must be below --sequence-length {arguments.sequence_length} - 1, so that keys lie beyond it"
        )
    return arguments


def main() -> None:
    arguments = checked(parser().parse_args())

    import torch
    from tqdm import tqdm

    from megatron_zebra.data.indexed import IndexedPair
    from megatron_zebra.data.rows import OnePass
    from megatron_zebra.data.source import FileSource, check_vocabulary
    from megatron_zebra.evaluation.attention_mass import most_distant, profile
    from megatron_zebra.evaluation.load import load_model
    from megatron_zebra.parallel.process import world
    from megatron_zebra.report.attention_profile import write_profile

    pair = IndexedPair(arguments.data)
    with world(arguments.device, 600.0, named="--device") as grid:
        dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
        arch, model = load_model(arguments.checkpoint, grid.device, dtype)
        if warning := check_vocabulary(pair, arch.vocab_size):
            print(f"warning: {warning}", file=sys.stderr)
        keep = arguments.keep or max(1, arch.num_layers // 4)
        if keep > arch.num_layers:
            raise UserError(f"--keep {keep}: the model has {arch.num_layers} layers")
        source = FileSource(pair, None, arch.vocab_size if pair.info is None else None)
        every = OnePass(source, arguments.sequence_length, arguments.rows)
        rows = [every.read(i) for i in range(len(every))]
        with tqdm(total=len(rows) * arch.num_layers, unit="layer", desc="attention") as bar:
            try:
                found = profile(model, rows, arguments.windows, arguments.sinks, arguments.every, bar.update)
            except ValueError as error:
                raise UserError(f"--data {arguments.data}: {error}") from None
    chosen = most_distant(found, arguments.window, keep)
    by_layer = found.mass_without_sinks.mean(-1).numpy()
    at = arguments.windows.index(arguments.window)
    _print(arguments.windows, found.mass.mean(-1).tolist(), by_layer.tolist(), chosen)
    document: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "windows": arguments.windows,
        "sinks": arguments.sinks,
        "queries": found.queries,
        "mass": found.mass.tolist(),
        "mass_without_sinks": found.mass_without_sinks.tolist(),
        "window": arguments.window,
        "keep": chosen,
    }
    table, picture = (arguments.output.with_name(arguments.output.name + end) for end in (".json", ".png"))
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(json.dumps(document) + "\n")
        write_profile(
            picture, arguments.windows, by_layer, found.mass_without_sinks[at].numpy(), arguments.window, chosen
        )
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"written to {table} and {picture}")


def _print(windows: list[int], mass: list[list[float]], without: list[list[float]], chosen: list[int]) -> None:
    print("attention beyond a window, in all and without that on the first tokens (%); * would stay global")
    print("layer  " + "".join(f"{f'beyond {window}':>18}" for window in windows))
    for layer in range(len(mass[0])):
        cells = "".join(f"{100 * mass[i][layer]:>10.1f}{100 * without[i][layer]:>8.1f}" for i in range(len(windows)))
        print(f"{layer:5}{'*' if layer in chosen else ' '} {cells}")
    print(f"--pattern {','.join(map(str, chosen))}")


if __name__ == "__main__":
    run_tool(main)
