"""How long a training step should take on GPUs: a roofline of few terms. Pure: no torch.

    matrix      model and recomputed matrix products at MATRIX of the peak
    attention   each layer's query-key pairs at ATTENTION of the peak; a window's tiles are computed whole, which costs as
                much as EDGE more keys a query
    elementwise norms, RoPE, SwiGLU, residual and loss run from memory: PASSES times over what a step without
                recomputation would keep
    optimizer   OPTIMIZER_BYTES a parameter whose state the rank holds
    exchange    the bytes of ``communication`` by kind over the link that its group spans, at LINK of its rate; nothing is
                taken to overlap with computing
    bubble      what the pipeline's ranks wait: (pp - 1) / (micro-batches x stages a rank) of the computing, a third of it with
                zero-bubble schedules

The constants were fitted to two models on one H200 with flash-attn 2 (docs/measurements.md); exchange and bubble were
not measured on GPUs.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from megatron_zebra.attention.window import allowed_pairs
from megatron_zebra.config.derived import stages_per_rank
from megatron_zebra.config.sections import Config, Parallel
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.layout import AXES, Layout
from megatron_zebra.planning.activations import activations
from megatron_zebra.planning.communication import busiest_bytes
from megatron_zebra.planning.devices import Device
from megatron_zebra.planning.flops import Flops, head_flops, matrix_parameters, recomputed, train_flops
from megatron_zebra.planning.parameters import held_parameters, weight_bytes
from megatron_zebra.planning.stages import Stages

MATRIX = 0.70
ATTENTION = 0.30
EDGE = 500
PASSES = 20
OPTIMIZER_BYTES = 40
LINK = 0.8


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in nodes; ``network``: bytes/s that one GPU receives from other nodes."""

    device: Device
    node: int = 8
    network: float = 50e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, and what they come to."""

    parts: dict[str, float]
    tokens: int
    flops: int
    gpus: int
    peak: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.flops / self.total / self.gpus / self.peak

    def days(self, tokens: float) -> float:
        """To train on so many."""
        return tokens / self.tokens_per_second / 86400


def step_time(arch: Architecture, config: Config, layout: Layout, stages: Stages, machine: Machine) -> StepTime:
    """A step of ``training.global_batch_size`` rows of ``data.sequence_length`` tokens, each row one document."""
    training, rows = config.training, config.training.global_batch_size
    length = config.data.sequence_length
    count = rows // (training.micro_batch_size * layout.dp)
    ranks = [_computing(arch, config, stages, rank, machine.device) for rank in range(layout.pp)]
    slowest = max(ranks, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * count for name, seconds in slowest.items()}
    parts["bubble"] = sum(parts.values()) * _bubble(config, count)
    held = max(held_parameters(arch, config.parallel, stages, rank, training)[1] for rank in range(layout.pp))
    over = layout.dp * layout.cp if config.optimizer.zero_stage else 1
    parts["optimizer"] = OPTIMIZER_BYTES * held / over / machine.device.memory_rate
    for name, received in busiest_bytes(arch, config, layout, stages).items():
        parts[name] = received / LINK / rate(name, layout, machine)
    return StepTime(
        parts=parts,
        tokens=rows * length,
        flops=train_flops(arch, [length]).total * rows,
        gpus=layout.world_size,
        peak=machine.device.peak_flops,
    )


def _computing(arch: Architecture, config: Config, stages: Stages, pp_rank: int, device: Device) -> dict[str, float]:
    """Seconds of one micro-batch's forward and backward on a pipeline rank, by part."""
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    share = training.micro_batch_size / (parallel.tp * parallel.cp)
    held = stages.layers_of_rank(pp_rank)
    blocks = Flops(2 * matrix_parameters(arch)[0] * length * len(held) // arch.num_layers, 0, 0)
    matrix = 3 * blocks.blocks + recomputed(arch, blocks, training.recompute)
    if len(stages) - 1 in stages.of_rank(pp_rank):
        matrix += 3 * head_flops(arch, length).head
    windows = Counter(map(arch.window, held))
    pairs = sum(_pairs_of_busiest(window, length, parallel) * layers for window, layers in windows.items())
    attention = 4 * pairs * arch.num_heads * arch.head_dim * (3 if training.recompute == "none" else 4)
    kept = sum(
        activations(
            arch,
            training.micro_batch_size * length,
            element_bytes=weight_bytes(config),
            recompute="none",
            loss_chunk_size=training.loss_chunk_size,
            on_cpu=False,
            parallel=parallel,
            layers=stages.layers[stage],
            rows=training.micro_batch_size,
        ).kept
        for stage in stages.of_rank(pp_rank)
    )
    return {
        "matrix": matrix * share / device.peak_flops / MATRIX,
        "attention": attention * training.micro_batch_size / parallel.tp / device.peak_flops / ATTENTION,
        "elementwise": kept * PASSES * (4 / 3 if training.recompute == "full" else 1) / device.memory_rate,
    }


def _pairs_of_busiest(window: int | None, length: int, parallel: Parallel) -> float:
    """Of the context-parallel rank that has most: zigzag is even, in contiguous order it is the last."""
    whole = _pairs_computed(window, length)
    if parallel.cp_order == "zigzag":
        return whole / parallel.cp
    return whole - _pairs_computed(window, length - length // parallel.cp)


def _pairs_computed(window: int | None, length: int) -> int:
    pairs = allowed_pairs([length], window=window)
    return pairs if window is None else min(pairs + EDGE * length, allowed_pairs([length]))


def _bubble(config: Config, micro_batches: int) -> float:
    """Waiting over computing."""
    parallel = config.parallel
    waiting = (parallel.pp - 1) / (micro_batches * stages_per_rank(parallel))
    return waiting / 3 if parallel.pp_schedule == "zero_bubble" else waiting


AXES_OF = {
    "tp": ("tp",),
    "cp local": ("cp",),
    "cp global": ("cp",),
    "pp": ("pp",),
    "ends": ("pp",),
    "data": ("dp", "cp"),
}
TOGETHER = ("tp", "data")  # rings, which every GPU of a node feeds at once


def rate(kind: str, layout: Layout, machine: Machine) -> float:
    """Bytes/s at which a rank of the slowest group receives ``kind``: its node's links, or the network where it spans nodes."""
    axes = AXES_OF[kind]
    size = prod(getattr(layout, axis) for axis in axes)
    stride = prod(layout.sizes[AXES.index(axes[-1]) + 1 :])
    here = _together(size, stride, layout.world_size, machine.node)
    if here == size:
        return machine.device.link
    return min(machine.device.link, machine.network * (here if kind in TOGETHER else 1))


@lru_cache(maxsize=4096)
def _together(size: int, stride: int, world: int, node: int) -> int:
    """Of groups of ``size`` ranks, ``stride`` apart, in a world of nodes of ``node``: the fewest that one has on a node."""
    starts = np.arange(world).reshape(-1, size, stride)[:, 0]
    groups = np.unique(starts % node)[:, None] + stride * np.arange(size)  # [groups, size]; the others lie alike
    return min(int(np.unique(group // node, return_counts=True)[1].min()) for group in groups)
