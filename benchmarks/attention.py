"""What a window layer's attention costs on a CPU: ours, full attention, and two ways to write a band in plain torch.

    python benchmarks/attention.py [--lengths 4096 16384 65536] [--windows 128 512] [--repeats 3]

Times are of one forward and backward of one layer, in ms of this process's CPU time with one thread (so that other
processes disturb them less), else of wall time. Full attention is our own causal path: one kernel call. Every other
measurement is the median of ``--repeats``, half of them made before the full one and half after it.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_zebra.attention.blocks import plan
from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import allowed_pairs

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MAX_FULL = 16384  # full attention beyond this takes minutes
SPEEDUP = {512: 11.0, 128: 30.0}  # over full, at 16384
GROWTH = 6.0  # from 16384 to 65536
MEMORY_MIB = 400.0  # at 65536, w = 512


# --- a band in plain torch --------------------------------------------------------------------------------------------


def band_mask(rows: int, lead: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, lead + rows]: 0 where row r sees the key, ``lead + r - window .. lead + r``; else -inf."""
    distance = torch.arange(rows)[:, None] + lead - torch.arange(lead + rows)[None]
    return torch.zeros(rows, lead + rows, dtype=dtype).masked_fill_((distance < 0) | (distance > window), float("-inf"))


def sliced_sdpa(window: int, block: int) -> Attend:
    """A loop over blocks of queries, each with the slice of keys that it sees."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        inner, outs = band_mask(block, window, window, q.dtype), []
        for a in range(0, q.shape[2], block):
            b = min(a + block, q.shape[2])
            c = max(0, a - window)
            mask = inner if b - c == window + block else band_mask(b - a, a - c, window, q.dtype)
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, a:b], k[:, :, c:b], v[:, :, c:b], attn_mask=mask, enable_gqa=True
                )
            )
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return attend


def unfolded_sdpa(window: int, block: int) -> Attend:
    """One call for all blocks of queries, their keys as overlapping views made by unfold."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens, heads, dim = q.shape
        n = -(-tokens // block)
        end = n * block - tokens
        keys, values = (
            F.pad(x, (0, 0, 0, 0, window, end)).unfold(0, window + block, block).transpose(-1, -2) for x in (k, v)
        )
        queries = F.pad(q, (0, 0, 0, 0, 0, end)).view(n, block, heads, dim).transpose(1, 2)
        before = torch.arange(n)[:, None] * block + torch.arange(window + block) < window
        mask = band_mask(block, window, window, q.dtype).masked_fill(before[:, None], float("-inf"))[:, None]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(n * block, heads, dim)[:tokens]

    return attend


def ours(segments: Segments, window: int | None) -> Attend:
    return lambda q, k, v: attention(q, k, v, segments, window=window, backend="cpu")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Inputs of one layer at one length."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    clock: Callable[[], float]

    @classmethod
    def make(cls, length: int, args: argparse.Namespace) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)

        def random(heads: int) -> torch.Tensor:
            return torch.randn(length, heads, args.head_dim, generator=generator).to(dtype)

        q, k, v = (random(h).requires_grad_() for h in (args.heads, args.kv_heads, args.kv_heads))
        return cls(q, k, v, random(args.heads), time.process_time if args.threads == 1 else time.perf_counter)

    def run(self, attend: Attend) -> tuple[float, float]:
        """Milliseconds of forward, and of backward."""
        start = self.clock()
        out = attend(self.q, self.k, self.v)
        middle = self.clock()
        torch.autograd.grad(out, (self.q, self.k, self.v), self.d_out)
        return (middle - start) * 1e3, (self.clock() - middle) * 1e3


@dataclass
class Times:
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, times: tuple[float, float]) -> None:
        self.forward.append(times[0])
        self.backward.append(times[1])

    @property
    def total(self) -> float:
        return statistics.median(map(sum, zip(self.forward, self.backward)))

    def __str__(self) -> str:
        forward, backward = statistics.median(self.forward), statistics.median(self.backward)
        return f"{self.total:9.0f} ({forward:.0f} + {backward:.0f})"


def measure(length: int, args: argparse.Namespace) -> tuple[Times | None, dict[int, dict[str, Times]]]:
    """Full attention (None beyond MAX_FULL), and by window the ways to compute the band."""
    problem, segments = Problem.make(length, args), Segments.from_lengths([length])
    ways: dict[int, dict[str, Attend]] = {}
    for w in args.windows:
        ways[w] = {"ours": ours(segments, w)}
        if length <= MAX_FULL:
            ways[w] |= {"sliced": sliced_sdpa(w, 256), "unfolded": unfolded_sdpa(w, 64)}
    times = {w: {name: Times() for name in attends} for w, attends in ways.items()}

    def repeat(n: int) -> None:
        for _ in range(n):
            for w, attends in ways.items():
                for name, attend in attends.items():
                    times[w][name].add(problem.run(attend))

    repeat((args.repeats + 1) // 2)
    full = None
    if length <= MAX_FULL:
        full = Times()
        for _ in range(1 if length > 8192 else args.repeats):
            full.add(problem.run(ours(segments, None)))
    repeat(args.repeats // 2)
    return full, times


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def memory_mib(length: int, window: int, args: argparse.Namespace) -> tuple[float, float]:
    """Peak resident memory of forward and backward beyond the inputs; and beyond output and gradients too."""
    Problem.make(4096, args).run(ours(Segments.from_lengths([4096]), window))  # load what is loaded on first use
    problem, segments = Problem.make(length, args), Segments.from_lengths([length])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs left free, or it would be taken for nothing here
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mib("VmRSS")
    problem.run(ours(segments, window))
    peak = status_mib("VmHWM") - before
    results = 2 * problem.q.nbytes + problem.k.nbytes + problem.v.nbytes
    return peak, peak - results / 2**20


# --- the report -------------------------------------------------------------------------------------------------------


class Verdict:
    def __init__(self) -> None:
        self.failed = False

    def __call__(self, claim: str, holds: bool) -> None:
        self.failed |= not holds
        print(f"{'PASS' if holds else 'FAIL'}  {claim}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens")
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 512], help="w: w + 1 keys")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    group = args.heads // args.kv_heads
    print(f"{args.heads}/{args.kv_heads} heads of {args.head_dim}, {args.dtype}, {args.threads} thread(s)")
    print("\nms, forward + backward; 'over full' beside what the mask's pairs and our tiles' pairs predict")
    print(
        f"{'S':>6} {'w':>5} {'full':>8} {'ours':>22} {'over full':>10} {'pairs':>6} {'tiles':>6} {'sliced':>8} {'unfolded':>8}"
    )

    local: dict[tuple[int, int], float] = {}
    verdict, claims = Verdict(), []
    for length in args.lengths:
        full, times = measure(length, args)
        for w, by_way in times.items():
            local[length, w] = by_way["ours"].total
            pairs = allowed_pairs([length]) / allowed_pairs([length], None, w)
            segments = Segments.from_lengths([length])
            tiles = allowed_pairs([length]) / plan(segments.cu_q, segments.cu_k, w, group).pairs
            ratio = full.total / by_way["ours"].total if full else float("nan")
            sdpa = [by_way[name].total if name in by_way else float("nan") for name in ("sliced", "unfolded")]
            row = f"{length:6} {w:5} {full.total if full else float('nan'):8.0f} {by_way['ours']!s:>22}"
            print(f"{row} {ratio:10.1f} {pairs:6.1f} {tiles:6.1f} {sdpa[0]:8.0f} {sdpa[1]:8.0f}", flush=True)
            if length == 16384:
                if w in SPEEDUP:
                    claims.append(
                        (f"w = {w}: {ratio:.1f} times faster than full, at least {SPEEDUP[w]:g}", ratio >= SPEEDUP[w])
                    )
                for name, ms in zip(("sliced", "unfolded"), sdpa):
                    times_faster = ms / by_way["ours"].total
                    claims.append((f"w = {w}: faster than {name} SDPA ({times_faster:.2f} times)", times_faster > 1))
    print()
    for claim, holds in claims:
        verdict(claim, holds)
    for w in args.windows:
        if (16384, w) in local and (65536, w) in local:
            growth = local[65536, w] / local[16384, w]
            verdict(f"w = {w}: 65536 tokens cost {growth:.2f} times 16384, at most {GROWTH:g}", growth <= GROWTH)
    if 65536 in args.lengths and 512 in args.windows and Path("/proc/self/clear_refs").exists():
        peak, extra = memory_mib(65536, 512, args)
        verdict(
            f"w = 512: 65536 tokens take {peak:.0f} MiB beyond the inputs, of which {extra:.0f} MiB are not output or "
            f"gradients; less than {MEMORY_MIB:g}",
            peak < MEMORY_MIB,
        )
    return int(verdict.failed)


if __name__ == "__main__":
    sys.exit(main())
