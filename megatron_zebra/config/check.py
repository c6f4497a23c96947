"""What no single key can know: the rules between keys, sections and the world size."""

from collections.abc import Iterator

from megatron_zebra.config.sections import Config, Rope

OWNED_BY_US = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "the training loop",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_optimization.stage": "optimizer.zero_stage",
    "zero_optimization.memory_efficient_linear": "the training loop",
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


def problems(config: Config, world_size: int) -> list[str]:
    """One line for each rule that is broken, naming the keys and what is allowed."""
    return [*_model(config), *_data(config), *_batch(config, world_size), *_optimizer(config), *_deepspeed(config)]


def warnings(config: Config) -> list[str]:
    """Things that are allowed and perhaps not meant."""
    model, data = config.model, config.data
    local = (model.layer_kinds is None and model.layer_group_size > 1) or "local" in (model.layer_kinds or [])
    found = []
    if local and model.window_size >= data.sequence_length:
        found.append(
            f"model.window_size = {model.window_size} is not below data.sequence_length = {data.sequence_length}: local layers see everything"
        )
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
    elif (model.head_dim or model.hidden_size // model.num_heads) % 2:
        yield f"model.head_dim = {model.head_dim or model.hidden_size // model.num_heads}: must be even (RoPE turns pairs)"
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        yield f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads}"
    if model.layer_kinds is not None and len(model.layer_kinds) != model.num_layers:
        yield f"model.layer_kinds: has {len(model.layer_kinds)} kinds, must have model.num_layers = {model.num_layers}"
    yield from _rope("model.rope", model.rope)
    if model.rope_local is not None:
        yield from _rope("model.rope_local", model.rope_local)


def _rope(path: str, rope: Rope) -> Iterator[str]:
    if rope.scaling in ("yarn", "llama3", "dynamic") and rope.original_length is None:
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
    scheduled = sum(phase.steps for phase in data.sequence_schedule)
    if data.sequence_schedule and scheduled >= training.steps:
        yield f"data.sequence_schedule: its {scheduled} steps must be fewer than training.steps = {training.steps}; the rest runs at data.sequence_length"


def _batch(config: Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    for name in ("tp", "cp", "pp"):
        if getattr(parallel, name) != 1:
            yield f"parallel.{name} = {getattr(parallel, name)}: this version divides work by data parallelism only (allowed: 1)"
            return
    micro = training.micro_batch_size
    sizes = [
        (f"training.batch_ramp[{i}].global_batch_size", phase.global_batch_size)
        for i, phase in enumerate(training.batch_ramp)
    ]
    for path, size in [*sizes, ("training.global_batch_size", training.global_batch_size)]:
        if size < world_size * micro:
            yield (
                f"{path} = {size}: feeds at most {size // micro} processes of training.micro_batch_size = {micro} rows, not {world_size} "
                f"(use fewer processes, or at least {world_size * micro})"
            )
        elif size % (world_size * micro):
            yield f"{path} = {size}: must be a multiple of micro_batch_size x data-parallel ranks = {micro} x {world_size} = {micro * world_size}"
    if training.profile_steps and training.profile_steps[0] > training.profile_steps[1]:
        yield f"training.profile_steps = {training.profile_steps}: the first must not be after the last"


def _optimizer(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield f"optimizer.min_learning_rate = {optimizer.min_learning_rate}: must not be above optimizer.learning_rate = {optimizer.learning_rate}"
    if (
        optimizer.decay_steps is not None
        and optimizer.schedule in ("linear", "cosine")
        and optimizer.decay_steps <= optimizer.warmup_steps
    ):
        yield f"optimizer.decay_steps = {optimizer.decay_steps}: must be above optimizer.warmup_steps = {optimizer.warmup_steps}"


def _deepspeed(config: Config) -> Iterator[str]:
    for path, owner in OWNED_BY_US.items():
        node: object = config.deepspeed
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None:
            yield f"deepspeed.{path}: is set by {owner}; take it out of the deepspeed section"
