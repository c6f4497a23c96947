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
from megatron_zebra.model.decoder import Decoder, Loss
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


Work = tuple[int, int, bool, bool]  # global and local layers, embedding, head: stages of one kind of work take one time


def work_of(arch: Architecture, layers: range) -> Work:
    full = sum(arch.layer_kinds[layer] == "global" for layer in layers)
    return full, len(layers) - full, 0 in layers, arch.num_layers - 1 in layers


def measured(arch: Architecture, stages: dict[Work, range], length: int, repeats: int) -> dict[Work, float]:
    """CPU seconds of each stage's forward and backward over one document: the fastest of ``repeats`` rounds over all of
    them, so that what else the machine does meets all alike."""
    rounds = [{work: _once(arch, layers, length) for work, layers in stages.items()} for _ in range(repeats)]
    return {work: min(seconds[work] for seconds in rounds) for work in stages}


def _once(arch: Architecture, layers: range, length: int) -> float:
    init = Initializer(0, 0.02, arch.num_layers, torch.float32, torch.device("cpu"))
    stage = Decoder(arch, init, layers=layers)
    tokens, segments = torch.arange(length) % arch.vocab_size, Segments.from_lengths([length])
    hidden = torch.randn(length, arch.hidden_size, requires_grad=True)
    began = time.process_time()
    out = stage(tokens, torch.arange(length), segments, tokens, hidden)
    (out.sum if isinstance(out, Loss) else out.sum()).backward()
    return time.process_time() - began


def show(name: str, stages: Stages, arch: Architecture, took: dict[Work, float]) -> float:
    """Print a split's stages; seconds of its slowest."""
    seconds = [took[work_of(arch, layers)] for layers in stages.layers]
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
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts (default: 3)")
    parser.add_argument("--pp", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pp in arguments.pp:
        layers = MODEL["model.num_layers"]
        assert isinstance(layers, int)
        equal = [layers * (i + 1) // pp - layers * i // pp for i in range(pp)]
        splits = {}
        for name, counts in (("by cost", None), ("equal counts", equal)):
            config = configured(pp, arguments.length, counts)
            arch = resolve(config.model, 0, arguments.length)
            splits[name] = stages_of(config, arch)
        kinds = {work_of(arch, stage): stage for stages in splits.values() for stage in stages.layers}
        took = measured(arch, kinds, arguments.length, arguments.repeats)
        found = {name: (max(stages.costs), show(name, stages, arch, took)) for name, stages in splits.items()}
        predicted, seconds = (found["equal counts"][i] / found["by cost"][i] for i in (0, 1))
        print(
            f"  equal counts' slowest stage over the chosen split's: predicted {predicted:.3f}, measured {seconds:.3f}\n"
        )


if __name__ == "__main__":
    main()
