#!/usr/bin/env python
"""Models of other programs in and out.

from-hf   a Hugging Face folder or .gguf file to a training checkpoint
to-hf     a training checkpoint to a Hugging Face folder that stock transformers and vLLM load
inspect   what model a folder holds, and which architectures of transformers can carry it
verify    the same logits on both sides?

  python tools/convert_checkpoint.py from-hf --hf SmolLM2-135M --output ckpt --layer-group-size 4 --window-size 512
  python tools/convert_checkpoint.py to-hf --checkpoint runs/adapted --output SmolLM2-135M-zebra
  python tools/convert_checkpoint.py verify --checkpoint runs/adapted --hf SmolLM2-135M-zebra
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_zebra.convert.folder import form_of
from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError, run_tool

MODEL = "a training checkpoint, a run folder (its newest good one), a Hugging Face folder or a .gguf file"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = top.add_subparsers(dest="task", required=True)

    task = tasks.add_parser("from-hf", help="to a training checkpoint")
    task.add_argument("--hf", required=True, type=Path, metavar="DIR", help="Hugging Face folder, or .gguf file")
    task.add_argument("--output", required=True, type=output_name, metavar="CKPT", help="folder to write")
    task.add_argument("--layer-group-size", type=int, metavar="L", help="layer i is global if i %% L == 0, else local")
    task.add_argument("--window-size", type=int, metavar="w", help="a local query sees itself and w keys before it")
    task.add_argument(
        "--pattern",
        help="first-of-group (the rule of --layer-group-size), numbers of the global layers (0,9,18), or a kind for each layer",
    )
    task.add_argument(
        "--rope-length",
        type=int,
        metavar="N",
        help="length that dynamic NTK is frozen for (default: factor x original)",
    )

    task = tasks.add_parser("to-hf", help="to a Hugging Face folder")
    task.add_argument("--checkpoint", required=True, type=Path, metavar="CKPT", help=MODEL)
    task.add_argument("--output", required=True, type=output_name, metavar="DIR", help="folder to write")
    task.add_argument(
        "--format",
        help="architecture (default: the first of llama, cwm, mistral, qwen2, qwen3, smollm3, granite-swa that can express the model)",
    )
    task.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of all weights (default: as stored)")
    task.add_argument(
        "--max-shard-size", type=_size, default=_size("5GB"), metavar="SIZE", help="of a file (default: 5GB)"
    )
    task.add_argument(
        "--tokenizer", type=Path, help="folder of tokenizer files, or one file (default: what was kept by from-hf)"
    )
    task.add_argument("--max-length", type=int, metavar="N", help="max_position_embeddings (default: the model's own)")

    task = tasks.add_parser("inspect", help="what model is it?")
    task.add_argument("--checkpoint", "--hf", required=True, type=Path, metavar="PATH", help=MODEL)

    task = tasks.add_parser("verify", help="compare logits with transformers beyond the window")
    task.add_argument("--checkpoint", required=True, type=Path, metavar="A", help=MODEL)
    task.add_argument("--hf", required=True, type=Path, metavar="B", help="folder that transformers loads")
    task.add_argument("--length", type=int, metavar="S", help="tokens (default: the window and 128 more, at least 256)")
    task.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of a logit, as a part of the largest logit (default: 1e-4)",
    )
    task.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    task.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return top


def main() -> None:
    arguments = vars(parser().parse_args())
    task = arguments.pop("task")
    for name in ("hf", "checkpoint"):
        path = arguments.get(name)
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"--{name} {path}: no such file or folder")
        form_of(path)  # found out before torch is imported, which takes seconds
    if task == "from-hf":
        from megatron_zebra.convert.from_hf import from_hf

        _tell(from_hf(arguments.pop("hf"), arguments["output"], **_without(arguments, "output")), arguments["output"])
    elif task == "to-hf":
        from megatron_zebra.convert.to_hf import to_hf

        options = _without(arguments, "checkpoint", "output", "format")
        notes = to_hf(arguments["checkpoint"], arguments["output"], form=arguments["format"], **options)
        _tell(notes, arguments["output"])
    elif task == "inspect":
        from megatron_zebra.convert.inspection import describe

        print(describe(arguments["checkpoint"]))
    else:
        from megatron_zebra.convert.verification import verify

        verdict = verify(arguments.pop("checkpoint"), arguments.pop("hf"), **arguments)
        print(verdict)
        sys.exit(0 if verdict.equal else 1)


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _tell(notes: list[str], output: Path) -> None:
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"written to {output}")


def _size(text: str) -> int:
    digits = text.rstrip("BKMGTbkmgt")
    unit = _UNITS.get(text[len(digits) :].upper())
    if unit is None or not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': a number of bytes, KB, MB or GB is needed (5GB)")
    return int(digits) * unit


if __name__ == "__main__":
    run_tool(main)
