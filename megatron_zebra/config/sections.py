"""Every key of the configuration, by section. The text beside a key is what --help prints."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_zebra.config.fields import Section, key

MOST_CP = 4096  # every rank plans what each sends to each
LayerKind = Literal["global", "local"]
WeightPart = Literal["embedding", "head", "attention", "mlp", "norms"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Rope(Section):
    """Rotary position embedding of one kind of layer."""

    theta: float = key(10000.0, "base of the frequencies", gt=1.0)
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = key(
        "none", "how positions beyond the original length are reached"
    )
    factor: float = key(1.0, "how many times longer than original_length (all scalings but none)", ge=1.0)
    original_length: int | None = key(
        None, "length the model was first trained at (dynamic, yarn, llama3)", "tokens", ge=1
    )
    length: int | None = key(
        None, "length that dynamic NTK is resolved for, once; null = data.sequence_length", "tokens", ge=1
    )
    beta_fast: float = key(32.0, "yarn: rotations above which a dimension is left alone", gt=0)
    beta_slow: float = key(1.0, "yarn: rotations below which a dimension is interpolated", gt=0)
    attention_factor: float | None = key(None, "yarn: factor on cos and sin; null = 0.1 ln(factor) + 1", gt=0)
    low_freq_factor: float = key(1.0, "llama3: wavelengths above original_length / this are divided by factor", gt=0)
    high_freq_factor: float = key(4.0, "llama3: wavelengths below original_length / this are left alone", gt=0)


class Model(Section):
    """The decoder: Llama-like, its layers global or local."""

    hidden_size: int = key(512, "width of the residual stream", ge=1, le=2**20)
    num_layers: int = key(8, "decoder layers", ge=1, le=10_000)
    num_heads: int = key(8, "query heads", ge=1, le=2**16)
    num_kv_heads: int | None = key(
        None, "key and value heads (grouped-query attention); null = num_heads", ge=1, le=2**16
    )
    head_dim: int | None = key(None, "width of a head, even; null = hidden_size / num_heads", ge=2, le=2**16)
    ffn_hidden_size: int | None = key(
        None, "width of the SwiGLU MLP; null = 8/3 hidden_size, rounded up to a multiple of 64", ge=1, le=2**24
    )
    vocab_size: int | None = key(
        None, "tokens in the vocabulary; null = what the data's tokenizer has", ge=2, le=2**31 - 1
    )
    layer_group_size: int = key(4, "L: layer i is global if i % L == 0, else local; 1 = all global", ge=1, le=10_000)
    window_size: int = key(
        512, "w: a local query sees itself and the w keys before it (w + 1 keys)", "tokens", ge=1, le=2**31 - 1
    )
    layer_kinds: list[LayerKind] | None = key(
        None, "one kind a layer, instead of layer_group_size: [global, local, ...]"
    )
    nope_layers: list[Annotated[int, Field(ge=0)]] = key(
        [], "layers, by number, without a rotary embedding (NoPE: SmolLM3, Cohere2)"
    )
    rope: Rope = key(Rope, "rotary embedding of global layers, and of local ones unless rope_local is set")
    rope_local: Rope | None = key(None, "rotary embedding of local layers; null = the same as rope")
    tie_embeddings: bool = key(False, "the head uses the embedding's weight")
    qkv_bias: bool = key(False, "bias on the q, k and v projections (Qwen2)")
    qk_norm: bool = key(False, "RMSNorm on every head's q and k before RoPE (Qwen3)")
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", gt=0)
    max_length: int | None = key(
        None,
        "longest sequence the model is meant for, told to other programs; null = the longest trained",
        "tokens",
        ge=1,
    )
    init_std: float = key(
        0.02,
        "deviation of the initial weights; projections into the residual stream get it divided by sqrt(2 num_layers)",
        gt=0,
    )
    attention_backend: Literal["auto", "flash", "torch", "cpu", "reference"] = key(
        "auto", "attention kernel; auto = cpu on CPU, flash-attn or torch on CUDA"
    )


class Parallel(Section):
    """How the world is divided; data parallelism takes what is left."""

    tp: int = key(1, "tensor-parallel ranks", ge=1)
    cp: int = key(1, "context-parallel ranks", ge=1, le=MOST_CP)
    pp: int = key(1, "pipeline-parallel ranks", ge=1)
    cp_order: Literal["zigzag", "contiguous"] = key(
        "zigzag", "which tokens of a row a context-parallel rank holds; zigzag = two chunks, with equal causal work"
    )
    cp_head_groups: int = key(
        1, "parts in which global layers fetch their KV heads, the next while this one is attended to", ge=1, le=2**16
    )
    cp_keep_fetched: bool = key(
        False, "global layers keep fetched keys and values for backward instead of fetching them again"
    )
    pp_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = key(
        "1f1b", "order of the micro-batches; interleaved and zero_bubble (ZBV) give each rank several stages"
    )
    pp_stages_per_rank: int | None = key(
        None, "stages of a rank; null = 1 for 1f1b, else 2 (zero_bubble: always 2)", ge=1, le=1000
    )
    pp_layers: list[Annotated[int, Field(ge=0)]] | None = key(
        None, "layers of each stage, in order; null = chosen so that the slowest stage costs least"
    )
    vocab_multiple: int = key(
        1, "rows of the embedding and the head on a rank are padded to a multiple of this", "rows", ge=1, le=2**16
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to compute; auto = cuda if there is one")
    timeout: float = key(600.0, "how long a collective may wait for the other ranks", "seconds", gt=0, le=1e7)
    hang_report: float = key(
        120.0,
        "time without progress after which it is told who waits in which collective and who does not, and stacks are logged; 0 = never",
        "seconds",
        ge=0,
        le=1e7,
    )


def _source(value: Any) -> Any:
    return {"prefix": value} if isinstance(value, str) else value


class Source(Section):
    """One tokenized data set, as written by tools/preprocess_data.py (or Megatron's)."""

    prefix: str = key(..., "path without .bin and .idx", min_length=1)
    weight: float = key(1.0, "share of the rows, relative to the other sources", gt=0)
    name: str | None = key(None, "name in metrics; null = the last part of prefix")
    min_document_tokens: int | None = key(
        None,
        "only documents at least so long; a prefix may be listed twice, its long documents with more weight",
        "tokens",
        ge=1,
    )
    max_document_tokens: int | None = key(
        None,
        "only documents at most so long (conversations that do not fit a row are left out with it)",
        "tokens",
        ge=1,
    )


def _sources(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


SourceList = Annotated[list[Annotated[Source, BeforeValidator(_source)]], BeforeValidator(_sources)]


class Synthetic(Section):
    """Seeded documents of ragged lengths, made on the fly: a run without files."""

    documents: int = key(0, "number of documents; 0 = read data.train instead", "documents", ge=0, le=10**7)
    mean_length: int = key(300, "mean length of a document", "tokens", ge=2, le=10**6)


class SequencePhase(Section):
    """A part of the sequence-length schedule."""

    steps: int = key(..., "optimizer steps at this length", "steps", ge=1, le=10**12)
    sequence_length: int = key(..., "tokens a row", "tokens", ge=2, le=2**31 - 1)


class Data(Section):
    """What is read, in which order and packing."""

    train: SourceList = key([], "training sources: a prefix, or a list of prefixes or of {prefix, weight, ...}")
    valid: SourceList = key(
        [], "validation sources, each with a loss of its own; empty = the held-out part of train by data.split"
    )
    split: list[Annotated[float, Field(ge=0)]] = key(
        [0.99, 0.01, 0.0],
        "shares of each training source's documents for training, validation, test",
        min_length=3,
        max_length=3,
    )
    tokenizer: str | None = key(None, "tokenizer file, checked against the data's; null = trust the data")
    sequence_length: int = key(2048, "S: tokens a row", "tokens", ge=2, le=2**31 - 1)
    sequence_schedule: list[SequencePhase] = key(
        [], "shorter (or other) lengths first: [{steps: 1000, sequence_length: 2048}, ...]; then sequence_length"
    )
    packing: Literal["concat", "best_fit"] = key(
        "concat", "concat cuts documents at a row's end; best_fit keeps them whole and pads"
    )
    attend_across_documents: bool = key(
        False, "one attention segment a row, as Megatron does by default; false keeps documents apart"
    )
    cache_dir: str | None = key(None, "where best_fit's index is kept; null = beside the data")
    synthetic: Synthetic = key(Synthetic, "synthetic documents instead of files")


class BatchPhase(Section):
    """A part of the ramp-up of the global batch."""

    steps: int = key(..., "optimizer steps at this size", "steps", ge=1, le=10**12)
    global_batch_size: int = key(..., "rows a step", "rows", ge=1, le=10**9)


class Lora(Section):
    """Low-rank adapters: each target computes x (W + alpha / rank B A)^T, and W is frozen."""

    rank: int = key(0, "rank of A and B; 0 = no adapters", ge=0, le=2**16)
    alpha: float = key(16.0, "the adapters' product counts alpha / rank", gt=0)
    targets: list[Projection] = key(["q_proj", "k_proj", "v_proj", "o_proj"], "projections that have adapters")
    also_train: list[WeightPart] = key(
        [], "parts trained in full beside the adapters (LongLoRA: embedding and norms); the rest is frozen"
    )


class Distill(Section):
    """A second loss: stay near what another model predicts for the same tokens."""

    teacher: str | None = key(
        None, "a model with the same vocabulary, named as in checkpoint.load; null = no distillation", min_length=1
    )
    weight: float = key(0.5, "share of temperature^2 KL(teacher || model); the rest is cross entropy", ge=0, le=1)
    temperature: float = key(1.0, "both models' logits are divided by it for the KL", gt=0)


class Spike(Section):
    """What to do when the loss of a step is far above what it was."""

    threshold: float = key(
        0.0, "standard deviations above the running mean from which a loss is a spike; 0 = none is", ge=0
    )
    window: int = key(100, "steps that mean and deviation look back, and that must be known first", "steps", ge=2)
    action: Literal["skip", "rewind"] = key(
        "skip", "skip = leave that update out; rewind = back to the newest checkpoint, leaving out the data since"
    )


class Training(Section):
    """The loop."""

    steps: int = key(1000, "optimizer steps in all", "steps", ge=1, le=10**12)
    global_batch_size: int = key(8, "rows a step over all ranks", "rows", ge=1, le=10**9)
    micro_batch_size: int = key(1, "rows a rank computes at once", "rows", ge=1, le=10**6)
    batch_ramp: list[BatchPhase] = key([], "smaller global batches first: [{steps: 100, global_batch_size: 2}, ...]")
    seed: int = key(1234, "of weights and data order", ge=0, le=2**63 - 1)
    precision: Literal["fp32", "bf16"] = key("bf16", "bf16 keeps fp32 masters and fp32 gradient sums")
    recompute: Literal["none", "attention", "full"] = key(
        "none",
        "activations computed again in backward instead of kept: those of each layer's attention (norm, q, k, v, kernel) or of all of it",
    )
    offload_activations: bool = key(False, "keep activations for backward in host memory")
    freeze: list[WeightPart] = key(
        [], "parts that are not trained: no gradient, no optimizer state; a tied head is the embedding"
    )
    lora: Lora = key(Lora, "")
    distill: Distill = key(Distill, "")
    loss_chunk_size: int = key(1024, "tokens whose logits exist at once", "tokens", ge=1, le=2**31 - 1)
    deterministic: bool = key(False, "deterministic kernels only (slower on a GPU)")
    max_nonfinite_steps: int = key(
        10,
        "stop after this many steps in a row that were skipped: loss or gradient not finite, or a spike",
        "steps",
        ge=1,
    )
    spike: Spike = key(Spike, "")
    compare_replicas: int = key(
        0, "steps between comparisons of weights that several ranks hold alike, to the bit; 0 = never", "steps", ge=0
    )
    profile_steps: list[int] | None = key(
        None, "[first, last] step recorded by torch.profiler into run_dir/profile", "steps", min_length=2, max_length=2
    )
    memory_snapshot_steps: list[int] = key(
        [], "steps after which a memory snapshot is written into run_dir/memory", "steps"
    )


def _stage(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("must be a whole number")  # true and 1.0 equal 1
    return value


class Optimizer(Section):
    """AdamW, its learning rate, and ZeRO."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_stage)] = key(
        1, "what is split over data-parallel ranks: 1 optimizer state, 2 and gradients, 3 and weights"
    )
    learning_rate: float = key(3e-4, "peak learning rate", gt=0)
    min_learning_rate: float = key(0.0, "learning rate at the end of the decay", ge=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = key(
        "cosine", "shape after the warm-up; wsd = constant, then a linear decay over decay_steps"
    )
    warmup_steps: int = key(0, "linear warm-up from 0", "steps", ge=0)
    decay_steps: int | None = key(
        None,
        "linear, cosine: length with the warm-up (null = training.steps); wsd: the last steps that decay (null = a tenth)",
        "steps",
        ge=1,
    )
    weight_decay: float = key(0.1, "on matrices; norms and biases have none", ge=0)
    beta1: float = key(0.9, "AdamW", ge=0, lt=1)
    beta2: float = key(0.95, "AdamW", ge=0, lt=1)
    eps: float = key(1e-8, "AdamW", gt=0)
    offload: bool = key(False, "keep and update the optimizer's state in host memory (ZeRO 1, 2, 3)")
    clip_grad: float = key(1.0, "largest norm of the gradient; 0 = no clipping", ge=0)


class Checkpoint(Section):
    """Saving and starting from a checkpoint. The same run_dir always resumes exactly."""

    interval: int = key(500, "steps between saves (one more at the end); 0 = only at the end", "steps", ge=0)
    keep_last: int = key(3, "newest checkpoints kept", ge=1)
    keep_every: int = key(0, "keep those of every so many steps for ever; 0 = none", "steps", ge=0)
    background: bool = key(
        True, "training waits for a copy of the state in host memory alone, and goes on while that is written"
    )
    mirror: str | None = key(
        None,
        "address of a second home for each checkpoint, of any kind that fsspec knows: s3://bucket/run",
        min_length=1,
    )
    time_budget: float = key(0.05, "part of the time that training may wait for saves; more is warned of", gt=0, le=1)
    load: str | None = key(None, "a checkpoint to begin a new run from, if run_dir holds none")
    load_part: Literal["all", "weights"] = key(
        "all", "all = weights, moments, step and data order; weights = a fresh optimizer at step 0"
    )
    schedule: Literal["continue", "restart"] = key(
        "continue", "learning rate of a run begun from checkpoint.load: go on, or warm up anew from its step"
    )


class EvaluationTask(Section):
    """A task of tools/evaluate.py, run on the model in training; its result is run_dir/evaluation/NAME-step-N.json."""

    task: Literal["perplexity", "answers", "retrieval", "harness"] = key(..., "as in tools/evaluate.py")
    interval: int = key(..., "steps between two of its runs (one more at the end)", "steps", ge=1)
    name: str | None = key(None, "in metrics, and of its files; null = the task's", pattern=r"^[\w.-]+$")
    options: dict[str, Any] = key(
        {}, "by name, as of tools/evaluate.py TASK: {data: [data/held-out], sequence_length: [2048, 8192], stride: 512}"
    )


class Evaluation(Section):
    """Validation during training."""

    interval: int = key(0, "steps between validations (one more at the end); 0 = never", "steps", ge=0)
    rows: int = key(64, "rows read of each set, at most", "rows", ge=1)
    tasks: list[EvaluationTask] = key(
        [], "further ways to judge the model: [{task: retrieval, interval: 1000, options: {text: [books]}}, ...]"
    )


class Wandb(Section):
    """Weights & Biases; offline unless logged in."""

    enabled: bool = key(False, "log there")
    project: str = key("megatron-zebra", "project name")
    name: str | None = key(None, "run name; null = the run folder's")


class Logging(Section):
    """The run folder and what else is told."""

    run_dir: str | None = key(
        None,
        "folder of this run (configuration, logs, metrics.jsonl, evaluation.jsonl, checkpoints, plots); null = runs/ and the name of the configuration file",
    )
    interval: int = key(1, "steps between lines where there is no terminal for a bar", "steps", ge=1)
    tensorboard: bool = key(False, "also write TensorBoard events into run_dir/tensorboard")
    wandb: Wandb = key(Wandb, "Weights & Biases")
    peak_tflops: float | None = key(None, "peak of one device for MFU; null = known GPUs only", "TFLOP/s", gt=0)


class Config(Section):
    """The whole configuration."""

    model: Model = key(Model, "")
    parallel: Parallel = key(Parallel, "")
    data: Data = key(Data, "")
    training: Training = key(Training, "")
    optimizer: Optimizer = key(Optimizer, "")
    checkpoint: Checkpoint = key(Checkpoint, "")
    evaluation: Evaluation = key(Evaluation, "")
    logging: Logging = key(Logging, "")
    deepspeed: dict[str, Any] = key({}, "further DeepSpeed settings, passed on; those this project owns are refused")
