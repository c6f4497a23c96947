"""Time and memory of converting a model of 7B shape with made-up bf16 weights, both ways, and whether every byte comes back.

python benchmarks/convert.py --folder scratch       # needs 41 GB there, and removes what it made
python benchmarks/convert.py --folder scratch --layers 2
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import torch

from megatron_zebra.convert.families import understand
from megatron_zebra.convert.hosts import config_for
from megatron_zebra.convert.kept import write_json
from megatron_zebra.convert.safetensors import INDEX
from megatron_zebra.convert.shards import plan, split, write_shard
from megatron_zebra.data.progress import Progress
from megatron_zebra.model.architecture import Architecture

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TOOL = [sys.executable, "tools/convert_checkpoint.py"]


class MadeUp:
    """A source of random weights; each tensor begins elsewhere in one block of them."""

    def __init__(self, arch: Architecture) -> None:
        self.folder, self.architecture, self.notes = Path("made-up"), arch, list[str]()
        self.block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def names(self) -> list[str]:
        return sorted(self.architecture.parameter_shapes())

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read_tensor(
        self,
        name: str,
        kind: str = "weight",
        offsets: tuple[int, ...] | None = None,
        local_shape: tuple[int, ...] | None = None,
        flat_start: int = 0,
        flat_numel: int | None = None,
    ) -> torch.Tensor:
        rest = prod(self.architecture.parameter_shapes()[name]) - flat_start
        return self.block.roll(hash((name, flat_start)) % len(self.block))[: rest if flat_numel is None else flat_numel]


def make(folder: Path, layers: int) -> int:
    """Write the model; return its bytes."""
    arch = understand(folder, SHAPE | {"num_hidden_layers": layers}).architecture
    source = MadeUp(arch)
    planned = plan(source, "llama", None)
    shards = split(planned, 5 * 10**9)
    total = sum(tensor.bytes for tensor in planned)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_for(arch, "llama", 4096) | {"dtype": "bfloat16", "eos_token_id": 2})
    with Progress("making", total) as bar:
        for name, tensors in shards.items():
            write_shard(folder / name, tensors, source, bar)
    if len(shards) > 1:
        places = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def measured(*words: str | Path) -> tuple[float, float]:
    """Seconds and peak GiB of a run of the tool."""
    began = time.monotonic()
    process = subprocess.Popen([*TOOL, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words[0]} failed")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; removed at the end")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    root = arguments.folder
    if root.exists():
        raise SystemExit(f"{root}: is there already")
    try:
        total = make(root / "hf", arguments.layers)
        print(f"{total / 1e9:.2f} GB of bf16 weights, {arguments.layers} layers", flush=True)
        zebra = ["--layer-group-size", "4", "--window-size", "512"]
        for what, words in (
            ("from-hf", ["from-hf", "--hf", root / "hf", "--output", root / "checkpoint", *zebra]),
            ("to-hf", ["to-hf", "--checkpoint", root / "checkpoint", "--output", root / "out"]),
        ):
            seconds, peak = measured(*words)
            print(f"{what}: {seconds:.0f} s ({total / 1e6 / seconds:.0f} MB/s), peak {peak:.2f} GiB", flush=True)
        files = [path.name for path in (root / "hf").glob("*.safetensors")]
        _, differ, missing = filecmp.cmpfiles(root / "hf", root / "out", files, shallow=False)
        print("every byte of the weights came back" if not differ + missing else f"DIFFERENT: {differ + missing}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
