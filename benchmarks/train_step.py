"""One training step (forward, loss, backward, AdamW) by sequence length: Zebra, the same model with all layers full, and
transformers' CWM with the same weights. Each measurement is a process of its own, one thread; prints a table.

  python benchmarks/train_step.py                                      # 2k to 32k; about an hour
  python benchmarks/train_step.py --lengths 2048 4096 --models zebra full
  python benchmarks/train_step.py --lengths 65536 --models zebra --recompute full
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

MODELS = ("zebra", "full", "transformers")
MODEL = {
    "model.hidden_size": 512,
    "model.num_layers": 8,
    "model.num_heads": 8,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 1408,
    "model.vocab_size": 32000,
    "model.layer_group_size": 4,
    "model.window_size": 512,
}


def measure(which: str, length: int, recompute: str, memory_limit: float) -> dict[str, Any]:
    """CPU seconds of the fastest of a few steps, peak resident bytes; run in a process of its own."""
    import torch

    from benchmarks.transformers_model import transformers_cwm
    from megatron_zebra.attention.contract import Segments
    from megatron_zebra.config.load import load_config
    from megatron_zebra.model.architecture import resolve
    from megatron_zebra.model.decoder import Decoder
    from megatron_zebra.model.initialize import Initializer
    from megatron_zebra.planning.flops import train_flops

    torch.set_num_threads(1)
    settings = MODEL | ({"model.layer_group_size": 1} if which == "full" else {})
    arch = resolve(load_config(None, settings).model, 0, length)
    model: Any = Decoder(arch, Initializer(0, 0.02, 8, torch.float32, torch.device("cpu")), recompute=recompute)
    if which == "transformers":
        model = transformers_cwm(arch, model, "sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # An allocation beyond the limit fails in this process, instead of the machine running out.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit * 2**30),) * 2)

    def step(tokens: torch.Tensor) -> float:
        began = time.process_time()  # one thread: wall time, less what other programs take
        if which == "transformers":
            loss = model(tokens[None], labels=tokens[None]).loss
        else:
            labels = torch.cat([tokens[1:], torch.tensor([-100])])
            result = model(tokens, torch.arange(len(tokens)), Segments.from_lengths([len(tokens)]), labels)
            loss = result.sum / (len(tokens) - 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.loss = loss.item()  # type: ignore[attr-defined]
        return time.process_time() - began

    tokens = torch.randint(0, arch.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    step(tokens[:256])  # creates the moments, loads code
    seconds = min(step(tokens) for _ in range(2 if length <= 4096 else 1))
    return {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "flops": train_flops(arch, [length]).total,
        "loss": step.loss,  # type: ignore[attr-defined]
    }


def in_a_process(which: str, length: int, recompute: str, memory_limit: float) -> dict[str, Any] | None:
    """``measure`` in a new process; None if it ran out of memory."""
    words = [which, str(length), recompute, str(memory_limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--measure", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr or done.returncode == -9:
        return None
    raise SystemExit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recompute", choices=["none", "attention", "full"], default="none", help="of our two models")
    parser.add_argument("--memory-limit", type=float, default=20.0, help="GiB a process may take (default: 20)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        which, length, recompute, limit = arguments.measure
        print(json.dumps(measure(which, int(length), recompute, float(limit))))
        return
    print(
        f"{'S':>6}  {'model':13}{'tokens/s':>9}{'s/step':>9}{'peak GiB':>10}{'GFLOP/s':>9}{'loss':>9}   speed of zebra over it",
        flush=True,
    )
    for length in arguments.lengths:
        zebra: dict[str, Any] | None = None
        for which in arguments.models:
            result = in_a_process(which, length, arguments.recompute, arguments.memory_limit)
            if result is None:
                print(f"{length:6d}  {which:13}out of memory (limit {arguments.memory_limit:g} GiB)", flush=True)
                continue
            if which == "zebra":
                zebra = result
            note = ""
            if zebra is not None and which != "zebra":
                ratio, predicted = result["seconds"] / zebra["seconds"], result["flops"] / zebra["flops"]
                note = f"{ratio:.2f}x, memory {result['peak'] / zebra['peak']:.2f}x"
                if which == "full":
                    note += f", the FLOPs predict {predicted:.2f}x: {ratio / predicted:.0%}"
            print(
                f"{length:6d}  {which:13}{length / result['seconds']:9.1f}{result['seconds']:9.1f}{result['peak'] / 2**30:10.2f}"
                f"{result['flops'] / result['seconds'] / 1e9:9.1f}{result['loss']:9.4f}   {note}",
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
