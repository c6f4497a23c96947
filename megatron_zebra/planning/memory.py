"""Memory of one rank in a training step, by part. Pure: no torch.

P parameters of a rank (its tensor-parallel part of its stages' layers), dp ranks that ZeRO divides over (dp x cp), e =
bytes of a weight (4 in fp32, 2 in bf16), B = DeepSpeed's reduce_bucket_size (elements). Gradients are summed in fp32 in both precisions; the optimizer is AdamW with two fp32 moments, and fp32 masters
wherever the weights cannot be their own:

    ZeRO   weights                   gradients   masters                  moments
    0      e P                       4 P         4 P in bf16, else none   8 P
    1      e P                       4 P         4 P / dp                 8 P / dp
    2      e P                       4 P / dp    4 P / dp                 8 P / dp
    3      e P / dp + e min(P, 1e9)  4 P / dp    4 P / dp                 8 P / dp

Weights that are not trained (training.freeze, training.lora) are counted with the weights alone. What a frozen weight's
layer no longer keeps for its gradient is not taken off the activations, which so are an upper bound.

The second term of stage 3 is what it may hold gathered (stage3_max_live_parameters). Reduction buffers, by measurement
of DeepSpeed 0.19.8 (tests/planning/test_memory.py): stage 1 fp32 4 B, bf16 4 min(P, 5e8), both after the last backward;
stage 2 e B and stage 3 4 B, with 4 min(P, B) in fp32, (4 + e) min(P, B) in bf16, during it
(stage 3, which gathers and frees meanwhile, was seen to need half as much again in a small model).
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.planning.activations import Activations, activations
from megatron_zebra.planning.parameters import held_parameters, weight_bytes
from megatron_zebra.planning.stages import Stages, in_flight

FP32 = 4
LIVE_PARAMETERS = 10**9
REDUCE_BUCKET = 5 * 10**8
ALLOWANCE_SHARE = 0.05
ALLOWANCE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """One line of the table: what, how many bytes, why so many."""

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Memory:
    """One rank's memory at the highest moment of a step."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)

    def __getitem__(self, name: str) -> int:
        return next(part.bytes for part in self.parts if part.name == name)


def memory_by_rank(
    arch: Architecture,
    config: Config,
    layout: Layout,
    stages: Stages,
    on_cpu: bool = False,
    teacher: Architecture | None = None,
) -> list[Memory]:
    """What a rank of each pipeline rank needs, at the longest rows of the run: [pp]."""
    tokens = config.training.micro_batch_size * longest_sequence(config)
    return [
        training_memory(arch, config, layout.dp * layout.cp, tokens, on_cpu, stages, rank, layout.dp, teacher)
        for rank in range(stages.pp)
    ]


def training_memory(
    arch: Architecture,
    config: Config,
    dp: int,
    tokens: int,
    on_cpu: bool = False,
    stages: Stages | None = None,
    pp_rank: int = 0,
    readers: int | None = None,
    teacher: Architecture | None = None,
) -> Memory:
    """What one of ``dp`` ranks needs.

    Args:
        dp: ranks that ZeRO divides over (dp x cp).
        tokens: of a micro-batch, all its rows, before context parallelism divides them.
        on_cpu: see ``activations``.
        stages, pp_rank: which of the pipeline's layers the rank holds; None: all.
        readers: data-parallel ranks without context parallelism, among which the global batch is divided; None: ``dp``.
        teacher: of a distillation (which knows no pipeline).
    """
    parallel, training, stage = config.parallel, config.training, config.optimizer.zero_stage
    e = weight_bytes(config)
    stages = stages or Stages.whole(arch.num_layers)
    parameters, trained = held_parameters(arch, parallel, stages, pp_rank, training)
    micro_batches = max(1, training.global_batch_size // (training.micro_batch_size * (readers or dp)))
    filled = in_flight(stages, parallel.pp_schedule, micro_batches, pp_rank)
    parts = state_parts(parameters, e, stage, dp, trained)
    if config.optimizer.offload and stage > 0:
        parts[-1] = Part("optimizer", 0, f"{parts[-1].note}: {parts[-1].bytes / 2**30:.2f} GiB of host memory")
    if teacher is not None:
        parts.append(_teacher(teacher, config, tokens))
    found = {
        number: activations(
            arch,
            tokens,
            element_bytes=e,
            recompute=training.recompute,
            loss_chunk_size=training.loss_chunk_size,
            on_cpu=on_cpu,
            parallel=parallel,
            layers=stages.layers[number],
            rows=training.micro_batch_size,
        )
        for number in filled
    }
    kept = sum(found[number].kept * count for number, count in filled.items())
    fullest = max(found.values(), key=lambda of_stage: of_stage.working)
    parts += _activation_parts(kept, fullest, config, sum(map(len, (stages.layers[number] for number in filled))))
    if len(stages) > 1:
        hidden = tokens // (parallel.cp * parallel.tp) * arch.hidden_size * e
        ends = (0 in filled) + (len(stages) - 1 in filled)
        buffers = (2 * len(filled) - ends) * micro_batches + sum(filled.values())
        parts.append(
            Part("pipeline", buffers * hidden, "hidden states and gradients on their way, of every micro-batch")
        )
    buffers = reduction_buffers(
        trained, e, stage, _zero_setting(config, "reduce_bucket_size", reduce_bucket_size(trained))
    )
    if stage == 1:
        # They are there when the activations are not.
        buffers = max(buffers - kept - fullest.working, 0)
    parts.append(Part("reduction buffers", buffers, "gradients on their way between ranks, beyond the above"))
    allowance = ALLOWANCE_BYTES + int(ALLOWANCE_SHARE * sum(part.bytes for part in parts))
    parts.append(Part("allowance", allowance, "5% for fragmentation, 1 GiB for the device's and communication's own"))
    return Memory(tuple(parts))


def saved_bytes(arch: Architecture, config: Config, dp: int, stages: Stages, pp_rank: int = 0) -> int:
    """Bytes that a rank writes of a checkpoint (masters, moments), and copies to host memory first (checkpoint.background)."""
    parameters, trained = held_parameters(arch, config.parallel, stages, pp_rank, config.training)
    return ceil((3 * FP32 * trained + weight_bytes(config) * (parameters - trained)) / dp)


def _teacher(teacher: Architecture, config: Config, tokens: int) -> Part:
    """Its weights, what it says of a micro-batch, and two more chunks of logits in the loss."""
    parallel, e = config.parallel, weight_bytes(config)
    weights = held_parameters(teacher, parallel, Stages.whole(teacher.num_layers), 0)[0] * e
    hidden = tokens // parallel.cp * teacher.hidden_size * e
    chunk = min(config.training.loss_chunk_size, tokens // parallel.cp)
    logits = 3 * chunk * FP32 * (teacher.vocab_size // parallel.tp)
    return Part(
        "teacher", weights + hidden + logits, "whole weights on every data-parallel rank, hidden states, logits"
    )


def state_parts(parameters: int, element_bytes: int, stage: int, dp: int, trained: int | None = None) -> list[Part]:
    """Weights, gradients and optimizer of one of ``dp`` ranks under ZeRO ``stage``; ``trained`` of the parameters (None: all)."""

    def share(whole: int, from_stage: int) -> int:
        return ceil(whole / dp) if stage >= from_stage else whole

    def note(text: str, from_stage: int) -> str:
        return f"{text}, 1/{dp} of them" if stage >= from_stage and dp > 1 else text

    p, e = parameters, element_bytes
    t = p if trained is None else trained
    kind = "bf16" if e == 2 else "fp32"
    gathered = min(p, LIVE_PARAMETERS) * e if stage == 3 else 0
    masters = FP32 * t if stage > 0 or e < FP32 else 0
    weights = f"{kind}, 1/{dp} of them and those gathered for use" if stage == 3 else kind
    return [
        Part("weights", share(e * p, 3) + gathered, weights),
        Part("gradients", share(FP32 * t, 2), note("fp32 sums", 2)),
        Part(
            "optimizer", share(masters + 2 * FP32 * t, 1), note("fp32 masters and moments" if masters else "moments", 1)
        ),
    ]


def reduce_bucket_size(parameters: int) -> int:
    """Elements of DeepSpeed's reduction bucket: its default, but never more than there are gradients to reduce."""
    return min(REDUCE_BUCKET, parameters)


def reduction_buffers(parameters: int, element_bytes: int, stage: int, bucket: int) -> int:
    """Bytes that DeepSpeed needs to reduce gradients."""
    e, filled = element_bytes, min(parameters, bucket)
    if stage == 0:
        return 0
    if stage == 1:
        return FP32 * bucket if e == FP32 else FP32 * min(parameters, REDUCE_BUCKET)
    own = e * bucket if stage == 2 else FP32 * bucket
    return own + filled * (FP32 if e == FP32 else FP32 + e)


def _activation_parts(kept: int, fullest: Activations, config: Config, layers: int) -> list[Part]:
    where = {"loss": "in the loss", "mlp": "in an MLP's backward", "attention": "in an attention's backward"}
    note = f"kept from forward for backward, recompute = {config.training.recompute}"
    if config.training.offload_activations:
        # One layer's are in use while the next one's are copied.
        note, kept = f"of two layers; {kept / 2**30:.2f} GiB in host memory", kept * min(2, layers) // layers
    return [
        Part("activations", kept, note),
        Part("working memory", fullest.working, f"beyond them at the highest moment, {where[fullest.highest]}"),
    ]


def _zero_setting(config: Config, name: str, default: int) -> int:
    """A number of the user's deepspeed.zero_optimization."""
    section: Any = config.deepspeed.get("zero_optimization")
    value = section.get(name, default) if isinstance(section, dict) else default
    return int(value) if isinstance(value, int | float) else default
