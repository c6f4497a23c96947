"""What no single key can know: the rules between keys, sections and the world size."""

from collections.abc import Iterator, Sequence
from typing import get_args

from megatron_zebra.attention.registry import BACKENDS
from megatron_zebra.config.derived import (
    ffn_width,
    head_dim,
    kv_heads,
    ranks_per_replica,
    sequence_multiple,
    stages_per_rank,
)
from megatron_zebra.config.sections import Config, Rope, WeightPart

OWNED_BY_US = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "the training loop",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_optimization.stage": "optimizer.zero_stage",
    "zero_optimization.memory_efficient_linear": "the training loop",
    "zero_optimization.offload_optimizer": "optimizer.offload",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "torch_autocast": "training.precision",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "steps_per_print": "logging.interval",
}

COUNTS_FROM_ORIGINAL = ("yarn", "llama3", "dynamic")
TRAINING_METRICS = ("valid", "loss", "communication_bytes")  # what comes before a "/" in them


def problems(config: Config, world_size: int) -> list[str]:
    """One line for each rule that is broken, naming the keys and what is allowed."""
    return [
        *_model(config),
        *_data(config),
        *_ranks(config, world_size),
        *_tensor(config),
        *_context(config),
        *_pipeline(config),
        *_batch(config, world_size),
        *_optimizer(config),
        *_frozen(config),
        *_evaluation(config),
        *_spike(config),
        *_deepspeed(config),
    ]


def divisions(config: Config) -> list[str]:
    """Those of ``problems`` that ask whether the model can be divided as ``parallel`` wants."""
    return [*_tensor(config), *_context(config)]


def warnings(config: Config) -> list[str]:
    """Things that are allowed and perhaps not meant."""
    model, data = config.model, config.data
    local = (model.layer_kinds is None and model.layer_group_size > 1) or "local" in (model.layer_kinds or [])
    found = []
    if local and model.window_size >= data.sequence_length:
        found.append(
            f"model.window_size = {model.window_size} is not below data.sequence_length = {data.sequence_length}: local layers see everything"
        )
    for path, rope in (("model.rope", model.rope), ("model.rope_local", model.rope_local)):
        if rope is not None and rope.scaling in ("linear", "yarn", "llama3") and rope.factor == 1.0:
            found.append(f"{path}.factor = 1.0: {rope.scaling} changes nothing")
    if config.optimizer.warmup_steps > config.training.steps:
        found.append(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is above training.steps = {config.training.steps}: "
            "the learning rate never reaches its peak"
        )
    return found


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size = {model.hidden_size}: must be a multiple of model.num_heads = {model.num_heads} (or set model.head_dim)"
        )
    elif head_dim(model) % 2:
        yield f"model.head_dim = {head_dim(model)}: must be even (RoPE turns pairs)"
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        yield f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads}"
    if model.layer_kinds is not None and len(model.layer_kinds) != model.num_layers:
        yield f"model.layer_kinds: has {len(model.layer_kinds)} kinds, must have model.num_layers = {model.num_layers}"
    if outside := [layer for layer in model.nope_layers if layer >= model.num_layers]:
        yield f"model.nope_layers: layer {outside[0]} is not below model.num_layers = {model.num_layers}"
    yield from _rope("model.rope", model.rope)
    if model.rope_local is not None:
        yield from _rope("model.rope_local", model.rope_local)


def _rope(path: str, rope: Rope) -> Iterator[str]:
    if rope.scaling in COUNTS_FROM_ORIGINAL and rope.original_length is None:
        yield f"{path}.original_length = null: must be the length trained at before, for {path}.scaling = {rope.scaling}"
    if rope.scaling == "none" and rope.factor != 1.0:
        yield f"{path}.factor = {rope.factor}: has no meaning for {path}.scaling = none"
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        yield f"{path}.high_freq_factor = {rope.high_freq_factor}: must be above {path}.low_freq_factor = {rope.low_freq_factor}"


def _data(config: Config) -> Iterator[str]:
    data, training = config.data, config.training
    if not data.train and not data.synthetic.documents:
        yield "data.train = []: must name at least one tokenized data set (tools/preprocess_data.py makes one), or set data.synthetic.documents"
    if data.train and data.synthetic.documents:
        yield f"data.synthetic.documents = {data.synthetic.documents}: must be 0 when data.train is given"
    if data.synthetic.documents and config.model.vocab_size is None:
        yield "model.vocab_size = null: must be given with data.synthetic"
    if sum(data.split) <= 0 or data.split[0] <= 0:
        yield f"data.split = {data.split}: the training share must be above 0"
    names = [source.name or source.prefix.rstrip("/").rsplit("/", 1)[-1] for source in data.valid]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.valid: two sets are named '{name}'; give each a name"
    for path, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for number, source in enumerate(sources):
            low, high = source.min_document_tokens, source.max_document_tokens
            if low is not None and high is not None and low > high:
                yield f"{path}[{number}].min_document_tokens = {low}: must not be above max_document_tokens = {high}"
    scheduled = sum(phase.steps for phase in data.sequence_schedule)
    if data.sequence_schedule and scheduled >= training.steps:
        yield f"data.sequence_schedule: its {scheduled} steps must be fewer than training.steps = {training.steps}; the rest runs at data.sequence_length"


def _ranks(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    size = ranks_per_replica(parallel)
    if world_size % size:
        yield (
            f"parallel.tp x cp x pp = {parallel.tp} x {parallel.cp} x {parallel.pp} = {size}: must divide the {world_size} "
            f"process{'es' if world_size > 1 else ''} (allowed: {_few(divisors(world_size), size)}; or use {_multiples(world_size, size)} processes)"
        )


def _tensor(config: Config) -> Iterator[str]:
    model, tp = config.model, config.parallel.tp
    heads, kv, ffn = model.num_heads, kv_heads(model), ffn_width(model)

    def allowed() -> str:
        return _few([n for n in divisors(heads) if ffn % n == 0 and (kv % n == 0 or n % kv == 0)], tp)

    if heads % tp:
        yield f"parallel.tp = {tp}: must divide model.num_heads = {heads} (allowed: {allowed()})"
    elif kv % tp and tp % kv:
        yield f"parallel.tp = {tp}: must divide model.num_kv_heads = {kv} or be a multiple of it (allowed: {allowed()})"
    if ffn % tp:
        yield f"parallel.tp = {tp}: must divide model.ffn_hidden_size = {ffn} (allowed: {allowed()})"


def _context(config: Config) -> Iterator[str]:
    model, parallel, data = config.model, config.parallel, config.data
    lengths = [
        *(
            (f"data.sequence_schedule[{i}].sequence_length", p.sequence_length)
            for i, p in enumerate(data.sequence_schedule)
        ),
        ("data.sequence_length", data.sequence_length),
    ]
    multiple = sequence_multiple(parallel)
    for path, length in lengths:
        if length % multiple:
            order = f" (cp_order {parallel.cp_order})" if parallel.cp > 1 else ""
            yield (
                f"{path} = {length}: must be a multiple of {multiple} under parallel.cp = {parallel.cp}{order} "
                f"and tp = {parallel.tp} (nearest: {_multiples(length, multiple)})"
            )
    held = max(1, kv_heads(model) // parallel.tp)
    if held % parallel.cp_head_groups:
        yield (
            f"parallel.cp_head_groups = {parallel.cp_head_groups}: must divide the {held} KV head{'s' if held > 1 else ''} "
            f"of a rank, model.num_kv_heads / parallel.tp (allowed: {_few(divisors(held), parallel.cp_head_groups)})"
        )
    backend = BACKENDS.get(model.attention_backend)
    if parallel.cp > 1 and backend is not None and not backend.fewer_queries:
        able = ", ".join(["auto", *(b.name for b in BACKENDS.values() if b.fewer_queries)])
        yield (
            f"model.attention_backend = {backend.name}: cannot have fewer queries than keys, as parallel.cp = {parallel.cp} "
            f"needs (allowed: {able})"
        )


_STAGES_PER_RANK = {"1f1b": "1", "interleaved": "2 or more", "zero_bubble": "2"}


def _pipeline(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    given, schedule, pp = parallel.pp_stages_per_rank, parallel.pp_schedule, parallel.pp
    if given is not None and not {"1f1b": given == 1, "interleaved": given > 1, "zero_bubble": given == 2}[schedule]:
        yield (
            f"parallel.pp_stages_per_rank = {given}: parallel.pp_schedule = {schedule} gives each rank "
            f"{_STAGES_PER_RANK[schedule]} (allowed: {_STAGES_PER_RANK[schedule]})"
        )
        return
    per_rank = stages_per_rank(parallel)
    stages = pp * per_rank
    if stages > model.num_layers:
        yield (
            f"parallel.pp = {pp}: its {stages} stages ({per_rank} a rank) are more than model.num_layers = {model.num_layers} "
            f"(allowed: {_at_most(model.num_layers // per_rank)})"
        )
    elif parallel.pp_layers is not None:
        layers = parallel.pp_layers
        if len(layers) != stages:
            yield f"parallel.pp_layers: has {len(layers)} stages, must have parallel.pp x stages a rank = {pp} x {per_rank} = {stages}"
        elif min(layers) < 1:
            yield f"parallel.pp_layers[{layers.index(0)}] = 0: must be at least 1"
        elif sum(layers) != model.num_layers:
            yield f"parallel.pp_layers = {layers}: must add up to model.num_layers = {model.num_layers}, not {sum(layers)}"
    if pp > 1 and config.optimizer.zero_stage != 1:
        yield (
            f"optimizer.zero_stage = {config.optimizer.zero_stage}: must be 1 with parallel.pp = {pp} "
            "(allowed: 1 with any pp; 0, 1, 2, 3 with pp = 1)"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    sizes = [
        *(
            (f"training.batch_ramp[{i}].global_batch_size", p.global_batch_size)
            for i, p in enumerate(training.batch_ramp)
        ),
        ("training.global_batch_size", training.global_batch_size),
    ]
    # Which of them are possible depends on dp, which an impossible layout leaves open.
    if world_size % ranks_per_replica(parallel) == 0:
        dp, micro = world_size // ranks_per_replica(parallel), training.micro_batch_size
        who = "processes" if dp == world_size else "data-parallel ranks"
        for path, size in sizes:
            if size < dp * micro:
                yield (
                    f"{path} = {size}: feeds at most {size // micro} {who} of training.micro_batch_size = {micro} rows, not {dp} "
                    f"(use fewer processes, or at least {dp * micro})"
                )
            elif size % (dp * micro):
                yield f"{path} = {size}: must be a multiple of micro_batch_size x data-parallel ranks = {micro} x {dp} = {micro * dp}"
            elif parallel.pp > 1:
                yield from _micro_batches(config, path, size // (dp * micro), dp * micro)
    for name in ("profile_steps", "memory_snapshot_steps"):
        steps = getattr(training, name) or []
        if min(steps, default=1) < 1:
            yield f"training.{name} = {steps}: steps must be at least 1, the first one"
    if training.profile_steps and training.profile_steps[0] > training.profile_steps[1]:
        yield f"training.profile_steps = {training.profile_steps}: the first must not be after the last"


def _micro_batches(config: Config, path: str, count: int, rows: int) -> Iterator[str]:
    """What torch's schedules ask of ``count``, the micro-batches of a step, each of ``rows`` over all ranks."""
    pp = config.parallel.pp
    given = f"{path} = {count * rows}: gives {count} micro-batch{'es' if count > 1 else ''}"
    if config.parallel.pp_schedule == "1f1b" and count < pp:
        yield f"{given}; parallel.pp = {pp} needs at least {pp} (allowed: {rows * pp} and more)"
    if config.parallel.pp_schedule == "interleaved" and count % _rounds(count, pp):
        below = next(n for n in range(count, 0, -1) if n % _rounds(n, pp) == 0)
        above = next(n for n in range(count, 2 * count + pp) if n % _rounds(n, pp) == 0)
        yield (
            f"{given}; pp_schedule = interleaved over parallel.pp = {pp} runs them in {_rounds(count, pp)} equal rounds "
            f"(nearest: {rows * below} or {rows * above})"
        )


def _rounds(micro_batches: int, pp: int) -> int:
    """As ScheduleInterleaved1F1B counts them."""
    return max(1, micro_batches // pp)


def divisors(n: int) -> list[int]:
    """Of ``n``, ascending."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _few(values: Sequence[int], wanted: int) -> str:
    """At most eight of ``values``, those nearest to what was wanted."""
    return ", ".join(map(str, sorted(sorted(values, key=lambda value: (abs(value - wanted), value))[:8])))


def _multiples(n: int, of: int) -> str:
    """The multiples of ``of`` nearest to ``n``."""
    below = n // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def _at_most(n: int) -> str:
    return f"1 to {n}" if n > 1 else "1"


def _optimizer(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.offload and optimizer.zero_stage == 0:
        yield "optimizer.offload = true: needs optimizer.zero_stage = 1, 2 or 3, not 0"
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield f"optimizer.min_learning_rate = {optimizer.min_learning_rate}: must not be above optimizer.learning_rate = {optimizer.learning_rate}"
    if (
        optimizer.decay_steps is not None
        and optimizer.schedule in ("linear", "cosine")
        and optimizer.decay_steps <= optimizer.warmup_steps
    ):
        yield f"optimizer.decay_steps = {optimizer.decay_steps}: must be above optimizer.warmup_steps = {optimizer.warmup_steps}"


def _frozen(config: Config) -> Iterator[str]:
    training, tied = config.training, config.model.tie_embeddings
    lora, freeze = training.lora, training.freeze
    for path, parts in (("training.freeze", freeze), ("training.lora.also_train", lora.also_train)):
        if tied and "head" in parts and "embedding" not in parts:
            yield f"{path}: head is the embedding's weight, with model.tie_embeddings = true; write embedding"
    if lora.rank and freeze:
        yield f"training.freeze = {freeze}: has no meaning with training.lora.rank = {lora.rank}, which freezes all but training.lora.also_train"
    if lora.rank and not lora.targets:
        yield f"training.lora.targets = []: must name at least one projection for training.lora.rank = {lora.rank}"
    if not lora.rank:
        trained = set(get_args(WeightPart)) - set(freeze) - ({"head"} if tied else set())
        if not trained:
            yield f"training.freeze = {freeze}: leaves nothing to train"
        elif config.parallel.pp > 1 and trained <= {"embedding", "head"}:
            yield (
                f"training.freeze = {freeze}: must leave attention, mlp or norms to train with parallel.pp = {config.parallel.pp} "
                "(each stage needs something)"
            )
    if training.distill.teacher is not None and config.parallel.pp > 1:
        yield (
            f"training.distill.teacher: cannot be used with parallel.pp = {config.parallel.pp} (allowed: 1): the teacher's last "
            "layer has to lie where the model's is"
        )


def _evaluation(config: Config) -> Iterator[str]:
    tasks = config.evaluation.tasks
    names = [task.name or task.task for task in tasks]
    for number, (task, name) in enumerate(zip(tasks, names)):
        path = f"evaluation.tasks[{number}]"
        if name in names[:number]:
            yield f"{path}.name = {task.name or 'null'}: another task is named '{name}' too; give each a name of its own"
        if name in TRAINING_METRICS:
            yield f"{path}.name = {name}: training's own metrics begin so ({', '.join(TRAINING_METRICS)}); give another"
        for key, value in (("parallel.pp", config.parallel.pp), ("optimizer.zero_stage", config.optimizer.zero_stage)):
            most = 1 if key == "parallel.pp" else 2
            if task.task != "perplexity" and value > most:
                yield (
                    f"{path}.task = {task.task}: needs all layers whole on a rank, which {key} = {value} does not leave "
                    f"(allowed: perplexity; or {key} up to {most})"
                )


def _spike(config: Config) -> Iterator[str]:
    spike = config.training.spike
    if spike.threshold and spike.action == "rewind" and config.data.sequence_schedule:
        yield "training.spike.action = rewind: must be skip with data.sequence_schedule, whose phases count the rows of every step"


def _deepspeed(config: Config) -> Iterator[str]:
    for path, owner in OWNED_BY_US.items():
        node: object = config.deepspeed
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None:
            yield f"deepspeed.{path}: is set by {owner}; take it out of the deepspeed section"
