"""Pipeline stages by cost against equal counts of layers: what the split predicts, and what each stage takes on this CPU.

  python benchmarks/stages.py                     # 30 layers, L = 4, 32k tokens, pp 4 and 8; about ten minutes
  python benchmarks/stages.py --length 8192

A small model (hidden 64, one head), one thread, CPU seconds of each stage's forward and backward.
"""

import argparse
import time

import torch

from megatron_zebra.attention.contract import Segments
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.stages import Stages

MODEL = {
    "model.hidden_size": 64,
    "model.num_layers": 30,
    "model.num_heads": 1,
    "model.ffn_hidden_size": 192,
    "model.vocab_size": 1024,
    "model.layer_group_size": 4,
    "model.window_size": 512,
    "data.synthetic.documents": 1,
}


def measured(arch: Architecture, layers: range, length: int, repeats: int) -> float:
    """CPU seconds of a stage's forward and backward over one document, the fastest of ``repeats``."""
    return min(_once(arch, layers, length) for _ in range(repeats))


def _once(arch: Architecture, layers: range, length: int) -> float:
    init = Initializer(0, 0.02, arch.num_layers, torch.float32, torch.device("cpu"))
    stage = Decoder(arch, init, layers=layers)
    tokens, segments = torch.arange(length) % arch.vocab_size, Segments.from_lengths([length])
    hidden = torch.randn(length, arch.hidden_size, requires_grad=True)
    began = time.process_time()
    out = stage(tokens, torch.arange(length), segments, tokens, hidden)
    (out.sum if isinstance(out, tuple) else out.sum()).backward()
    return time.process_time() - began


def show(name: str, stages: Stages, arch: Architecture, length: int, repeats: int) -> float:
    """Print a split's stages; seconds of its slowest."""
    seconds = [measured(arch, layers, length, repeats) for layers in stages.layers]
    over_mean = max(seconds) * len(seconds) / sum(seconds)
    print(f"pp {len(seconds)}  {name}: {[len(layers) for layers in stages.layers]}")
    print(
        f"  predicted TFLOP    {'  '.join(f'{cost / 1e12:6.3f}' for cost in stages.costs)}   slowest / mean {stages.slowest_over_mean:.3f}"
    )
    print(
        f"  measured seconds   {'  '.join(f'{second:6.2f}' for second in seconds)}   slowest / mean {over_mean:.3f}",
        flush=True,
    )
    return max(seconds)


def configured(pp: int, length: int, counts: list[int] | None) -> Config:
    return load_config(None, MODEL | {"data.sequence_length": length, "parallel.pp": pp, "parallel.pp_layers": counts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the row (default: 32768)")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many counts (default: 1)")
    parser.add_argument("--pp", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pp in arguments.pp:
        layers = MODEL["model.num_layers"]
        assert isinstance(layers, int)
        equal = [layers * (i + 1) // pp - layers * i // pp for i in range(pp)]
        found = {}
        for name, counts in (("by cost", None), ("equal counts", equal)):
            config = configured(pp, arguments.length, counts)
            arch = resolve(config.model, 0, arguments.length)
            stages = stages_of(config, arch)
            found[name] = (max(stages.costs), show(name, stages, arch, arguments.length, arguments.repeats))
        predicted, seconds = (found["equal counts"][i] / found["by cost"][i] for i in (0, 1))
        print(
            f"  equal counts' slowest stage over the chosen split's: predicted {predicted:.3f}, measured {seconds:.3f}\n"
        )


if __name__ == "__main__":
    main()
