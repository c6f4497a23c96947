"""Logits of given token ids, for comparing with any other framework.

--ids holds whole numbers, [T] or [batch, T]; --output gets fp32 [..., vocabulary]. Both are NumPy files. Every row is a text
of its own. However long the rows, only some thousand tokens' logits are in memory at once. Under torchrun the processes
divide each layer (tensor parallelism).
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import add_model, writing


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    task.add_argument("--ids", required=True, type=Path, metavar="IN.npy", help="token ids")
    task.add_argument("--output", required=True, type=output_name, metavar="OUT.npy", help="where the logits go")


def run(arguments: argparse.Namespace) -> None:
    ids = _read(arguments.ids)
    if arguments.output.exists() and arguments.output.samefile(arguments.ids):
        raise UserError(f"--output {arguments.output}: is the file of --ids; give another")
    import torch
    from tqdm import tqdm

    from megatron_zebra.evaluation.load import opened
    from megatron_zebra.inference.language_model import LanguageModel
    from megatron_zebra.launched import launched

    with opened(arguments, "logits.npy", tp=launched().world_size) as (subject, _, output):
        grid, vocab_size = subject.grid, subject.arch.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"--ids {arguments.ids}: token {wrong} is outside the vocabulary 0 .. {vocab_size - 1}")
        assert subject.decoder is not None
        model = LanguageModel(subject.arch, subject.decoder, grid.tp)
        rows = ids.reshape(-1, ids.shape[-1])
        chunks = (chunk for row in rows for chunk in model.logit_chunks(torch.from_numpy(row.astype(np.int64))))
        with tqdm(total=ids.size, desc="logits", unit="token", disable=None if grid.is_main else True) as bar:
            if grid.is_main:
                with writing(output):
                    _write(output, (*ids.shape, vocab_size), chunks, bar)
                print(f"{list(ids.shape)} tokens, {vocab_size} logits each, written to {output}")
            else:
                for _ in chunks:
                    pass


def _read(file: Path) -> Any:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"--ids {file}: cannot be read ({error.strerror or 'no .npy file'})") from None
    except (ValueError, EOFError):
        raise UserError(f"--ids {file}: is no .npy file of numbers") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "several arrays"
        raise UserError(f"--ids {file}: holds {what}; must be whole numbers [T] or [batch, T], at least one")
    return ids


def _write(output: Path, shape: tuple[int, ...], chunks: Any, bar: Any) -> None:
    """One chunk after another: a memory map would end the process where the disk is full."""
    temporary = output.with_name(output.name + ".tmp")
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk.float().cpu().numpy(), "<f4").data)
                bar.update(len(chunk))
        os.replace(temporary, output)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
