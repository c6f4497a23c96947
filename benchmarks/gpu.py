"""On one GPU: local against full attention by length; training steps of a Zebra and of full attention, with MFU; memory
against the plan.

  python benchmarks/gpu.py                                    # all three tables; about five minutes on an H100
  python benchmarks/gpu.py --only attention --lengths 8192 131072
  python benchmarks/gpu.py --only steps --lengths 8192 32768 --backend torch

Steps are those of pretrain_zebra.py itself (1.1 billion parameters, bf16, ZeRO-1, full recomputation, one row).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.registry import BACKENDS, module_exists
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, allowed_pairs
from megatron_zebra.config.load import load_config
from megatron_zebra.model.architecture import resolve
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.devices import peak_flops
from megatron_zebra.planning.memory import memory_by_rank

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MODEL: dict[str, Any] = {
    "model.hidden_size": 2048,
    "model.num_layers": 16,
    "model.num_heads": 16,
    "model.num_kv_heads": 4,
    "model.ffn_hidden_size": 8192,
    "model.vocab_size": 32768,
    "model.window_size": 1024,
    "training.precision": "bf16",
    "training.global_batch_size": 1,
    "training.recompute": "full",
    "training.loss_chunk_size": 4096,
    "training.steps": 6,
    "optimizer.zero_stage": 1,
    "data.synthetic.documents": 16,
}


def milliseconds(window: Window, length: int, backend: str, repeats: int = 5) -> float:
    """One forward and backward of one layer's attention, the median of ``repeats``."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        shape = (length, heads, HEAD_DIM)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()

    q, k, v = tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS)
    d_out = torch.randn_like(q)
    segments = Segments.from_lengths([length], device="cuda")
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attention(q, k, v, segments, window=window, backend=backend).backward(d_out)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


def attention_table(lengths: list[int], windows: list[int], backends: list[str]) -> None:
    print(f"\nattention, forward and backward: {HEADS} heads on {KV_HEADS}, head_dim {HEAD_DIM}, bf16")
    print(f"{'backend':8}{'tokens':>9}{'full ms':>10}{'TFLOP/s':>9}", end="")
    print("".join(f"{f'w {w}: ms':>13}{'TFLOP/s':>9}{'faster':>8}{'of pairs':>9}" for w in windows))
    for backend in backends:
        for length in lengths:
            full, pairs = milliseconds(None, length, backend), allowed_pairs([length])
            line = f"{backend:8}{length:>9}{full:>10.2f}{_tflops(pairs, full):>9.0f}"
            for window in windows:
                local, fewer = milliseconds(window, length, backend), allowed_pairs([length], window=window)
                line += f"{local:>13.2f}{_tflops(fewer, local):>9.0f}{full / local:>7.1f}x{pairs / fewer:>8.1f}x"
            print(line, flush=True)


def _tflops(pairs: int, ms: float) -> float:
    """Two products forward and four backward a pair and head; what the kernel computes again is not counted."""
    return 12 * pairs * HEADS * HEAD_DIM / ms / 1e9


def steps_table(lengths: list[int], backend: str, keep: Path | None) -> None:
    peak = peak_flops(torch.cuda.get_device_name())
    print(
        f"\nsteps of pretrain_zebra.py, {backend} attention, peak {peak / 1e12 if peak else float('nan'):.0f} TFLOP/s"
    )
    print(f"{'tokens':>8} {'layers':8}{'ms':>9}{'tokens/s':>10}{'MFU':>7}{'GiB':>8}{'planned':>9}{'off':>7}")
    for length in lengths:
        speed: dict[str, float] = {}
        for name, group in (("Zebra", 4), ("full", 1)):
            settings = MODEL | {
                "model.layer_group_size": group,
                "model.attention_backend": backend,
                "data.sequence_length": length,
                "data.synthetic.mean_length": 20 * length,
            }
            records, planned = measured(settings, keep and keep / f"{name}-{length}")
            last = sorted(records[2:], key=lambda record: record["step_time"])[len(records[2:]) // 2]
            held = last["peak_memory_bytes"]
            speed[name] = last["tokens_per_second"]
            print(
                f"{length:>8} {name:8}{last['step_time'] * 1e3:>9.0f}{speed[name]:>10,.0f}{last['mfu'] or float('nan'):>7.1%}"
                f"{held / 2**30:>8.2f}{planned / 2**30:>9.2f}{held / planned - 1:>+7.1%}",
                flush=True,
            )
        print(f"{'':>9}Zebra over full: {speed['Zebra'] / speed['full']:.2f}x")


def measured(settings: dict[str, Any], keep: Path | None) -> tuple[list[dict[str, Any]], int]:
    """Records of a run, and the bytes that the planner gives it without its allowance."""
    config = load_config(None, settings)
    arch = resolve(config.model, 0, config.data.sequence_length)
    plan = memory_by_rank(arch, config, Layout.of(1), stages_of(config, arch))[0]
    with tempfile.TemporaryDirectory() as folder:
        run = keep or Path(folder) / "run"
        words = [
            word for key, value in (settings | {"logging.run_dir": run}).items() for word in (f"--{key}", str(value))
        ]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "pretrain_zebra.py", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"after {time.monotonic() - began:.0f} s: {done.stderr[-3000:]}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return records, plan.total - plan["allowance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["attention", "steps"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--windows", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--backend", choices=["flash", "torch"], help="default: every one that is installed")
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: benchmarks/gpu.py needs a CUDA device")
    installed = [name for name in ("flash", "torch") if any(map(module_exists, BACKENDS[name].packages))]
    backends = [arguments.backend] if arguments.backend else installed
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if arguments.only != "steps":
        attention_table(arguments.lengths, arguments.windows, backends)
    if arguments.only != "attention":
        for backend in backends:
            steps_table(arguments.lengths, backend, arguments.keep)


if __name__ == "__main__":
    main()
