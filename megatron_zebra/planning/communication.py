"""Bytes that a rank receives in a training step, by the names under which ``parallel.group`` counts them. Pure: no torch.

A micro-batch has T tokens on a context-parallel rank; n ranks in a group; e = bytes of a weight (4 in fp32, 2 in bf16);
k = KV heads that a rank computes; as in ``parallel.group`` an all-gather or reduce-scatter of b bytes (whole) brings
b (n - 1) / n, an all-reduce twice that, an all-to-all exactly what it carries.

    cp local, cp global   a layer and micro-batch: 2 k head_dim e for each token fetched, the same for each gradient returned
    tp                    a block: 4 x T hidden e forward (all-gather and reduce-scatter, attention and MLP), 4 backward; 3
                          more where all of it is recomputed, 1 where its attention is (that stops at the last thing which
                          backward needs); embedding and head 2 each
    pp                    T / tp hidden e into each stage forward, and as much back from the next one
    ends                  the gradient of a tied weight, fp32, between first and last stage, once a step
    data                  gradients in fp32: all-reduced once a step (ZeRO 0, 1) or a micro-batch (2), reduce-scattered a
                          micro-batch (3); weights gathered once a step (1, 2), or for forward and backward of each (3)

DeepSpeed 0.19.8 all-reduces under stages 1 and 2 (``use_multi_rank_bucket_allreduce``). Left out: a few scalars a step.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_zebra.attention.window import Int64, Window
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.trained import is_trained
from megatron_zebra.parallel.context.layout import Order
from megatron_zebra.parallel.context.plan import tokens_received, tokens_sent
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.planning.parameters import heads_used, held_parameters, weight_bytes
from megatron_zebra.planning.stages import Stages

FP32 = 4


def step_bytes(
    arch: Architecture,
    config: Config,
    layout: Layout,
    stages: Stages,
    pp_rank: int,
    cp_rank: int = 0,
    batches: Sequence[npt.ArrayLike] | None = None,
    sequence_length: int | None = None,
) -> Counter[str]:
    """What the rank at these coordinates receives in a training step.

    Args:
        batches: cu_seqlens [documents + 1] of each of its micro-batches; None: those of a step of
            ``training.global_batch_size``, every row one document.
        sequence_length: tokens of a row; None: ``data.sequence_length``.
    """
    training, parallel = config.training, config.parallel
    length, rows = sequence_length or config.data.sequence_length, training.micro_batch_size
    count = training.global_batch_size // (rows * layout.dp) if batches is None else len(batches)
    total: Counter[str] = Counter()
    layers = Counter(arch.window(layer) for layer in stages.layers_of_rank(pp_rank))
    for window, number in layers.items():
        alike = count if batches is None else 1
        for cu_seqlens in [None] if batches is None else batches:
            received = context_bytes(arch, config, window, cu_seqlens, length)[cp_rank]
            total["cp global" if window is None else "cp local"] += number * alike * int(received)
    tokens = rows * length // layout.cp
    for stage in stages.of_rank(pp_rank):
        ends = (stage == 0, stage == len(stages) - 1)
        total["tp"] += count * tensor_bytes(arch, config, len(stages.layers[stage]), *ends, tokens)
    total["pp"] += count * pipeline_bytes(arch, config, stages, pp_rank, tokens)
    if is_trained("embedding.weight", training):
        total["ends"] += tied_bytes(arch, config, stages, pp_rank)
    parameters, trained = held_parameters(arch, parallel, stages, pp_rank, training)
    zero, ranks = config.optimizer.zero_stage, layout.dp * layout.cp
    total["data"] += data_bytes(parameters, weight_bytes(config), zero, ranks, count, trained)
    return Counter({name: value for name, value in total.items() if value})


def busiest_bytes(arch: Architecture, config: Config, layout: Layout, stages: Stages) -> Counter[str]:
    """``step_bytes`` of the rank that receives most, every row one document."""
    length = config.data.sequence_length
    windows = Counter(map(arch.window, range(arch.num_layers)))
    fetched = sum(count * context_bytes(arch, config, window, None, length) for window, count in windows.items())
    cp_rank = int(np.argmax(fetched))
    of_ranks = (step_bytes(arch, config, layout, stages, pp_rank, cp_rank) for pp_rank in range(layout.pp))
    return max(of_ranks, key=lambda received: received.total())


def context_bytes(
    arch: Architecture, config: Config, window: Window, cu_seqlens: npt.ArrayLike | None, sequence_length: int
) -> Int64:
    """What each context-parallel rank receives for one layer and micro-batch, forward and backward: [cp].

    ``cu_seqlens``: boundaries of the documents of all rows of the micro-batch; None: each row is one.
    """
    parallel = config.parallel
    if cu_seqlens is None:
        sent = config.training.micro_batch_size * _whole_row(sequence_length, parallel.cp, parallel.cp_order, window)
    else:
        rows = int(np.asarray(cu_seqlens)[-1]) // sequence_length
        sent = tokens_sent(cu_seqlens, rows, sequence_length, parallel.cp, parallel.cp_order, window)
    again = config.training.recompute != "none" or (window is None and not parallel.cp_keep_fetched)
    tokens = tokens_received(sent, fetches=2 if again else 1)
    row = 2 * heads_used(arch, parallel.tp)[1] * arch.head_dim * weight_bytes(config)
    return tokens * row


@lru_cache(maxsize=256)
def _whole_row(length: int, cp: int, order: Order, window: Window) -> Int64:
    """``tokens_sent`` of a row that is one document. A search asks for the same again and again."""
    return tokens_sent([0, length], 1, length, cp, order, window)


def tensor_bytes(arch: Architecture, config: Config, layers: int, first: bool, last: bool, tokens: int) -> int:
    """What a tensor-parallel rank receives for one micro-batch in a stage of ``layers``, forward and backward.

    Args:
        first, last: whether the stage has the embedding, the head.
        tokens: of the micro-batch on a context-parallel rank.
    """
    n, e = config.parallel.tp, weight_bytes(config)
    if n == 1:
        return 0

    def all_reduce(size: int) -> int:
        return 2 * size * (n - 1) // n

    hidden = tokens * arch.hidden_size * e * (n - 1) // n
    recomputed = {"none": 0, "attention": 1, "full": 3}[config.training.recompute]
    norm = all_reduce(arch.hidden_size * e)
    gradients = 2 * norm
    if arch.qk_norm:
        gradients += 2 * all_reduce(arch.head_dim * e)
    if Sharding(n, 0, arch.num_kv_heads).dimension("attention.k_proj.weight") is None:
        width = arch.num_kv_heads * arch.head_dim * e
        gradients += 2 * (all_reduce(width * arch.hidden_size) + (all_reduce(width) if arch.qkv_bias else 0))
    total = layers * ((8 + recomputed) * hidden + gradients)
    if first:
        total += 2 * hidden
    if last:
        chunk = min(config.training.loss_chunk_size, tokens)
        chunks = [chunk] * (tokens // chunk) + [rest for rest in [tokens % chunk] if rest]
        total += 2 * hidden + norm + sum(all_reduce(FP32 * c) + all_reduce(2 * FP32 * c) for c in chunks)
    return total


def pipeline_bytes(arch: Architecture, config: Config, stages: Stages, pp_rank: int, tokens: int) -> int:
    """Hidden states and gradients that a pipeline rank receives for one micro-batch of ``tokens`` on a cp rank."""
    hidden = tokens // config.parallel.tp * arch.hidden_size * weight_bytes(config)
    # Across each boundary between two ranks the later stage receives in forward, the earlier one in backward.
    edges = [pair for pair in pairwise(stages.ranks) if pair[0] != pair[1]]
    return hidden * sum(pp_rank in pair for pair in edges)


def tied_bytes(arch: Architecture, config: Config, stages: Stages, pp_rank: int) -> int:
    """The gradient of a tied weight, summed over the ranks of the first and the last stage once a step."""
    ends = {stages.ranks[0], stages.ranks[-1]}
    if not arch.tie_embeddings or len(ends) == 1 or pp_rank not in ends:
        return 0
    parallel = config.parallel
    box = Sharding(parallel.tp, 0, arch.num_kv_heads, parallel.vocab_multiple).box(
        "embedding.weight", (arch.vocab_size, arch.hidden_size)
    )
    return FP32 * box.padded[0] * box.padded[1]


def data_bytes(
    parameters: int, element_bytes: int, stage: int, ranks: int, micro_batches: int, trained: int | None = None
) -> int:
    """Gradients and weights of ``parameters`` held, over ``ranks`` (dp x cp) under ZeRO ``stage``, in a step.

    Under stage 3 an upper bound: small weights, and those used again soon, stay gathered. ``trained``: of the parameters
    (None: all), which alone have gradients and, but for stage 3, are gathered after the update.
    """
    t = parameters if trained is None else trained
    moved = parameters if stage == 3 else t
    gradients, weights = (b * count * (ranks - 1) // ranks for b, count in ((FP32, t), (element_bytes, moved)))
    return {
        0: 2 * gradients,
        1: 2 * gradients + weights,
        2: 2 * gradients * micro_batches + weights,
        3: (gradients + 2 * weights) * micro_batches,
    }[stage]
