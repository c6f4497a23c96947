"""Models of other programs, and lines of JSON: conversations, documents, metrics."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.convert.families import understand
from megatron_zebra.convert.names import sink_name, their_name
from megatron_zebra.convert.source import open_model
from megatron_zebra.data.chat import conversations
from megatron_zebra.data.documents import documents
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks
from megatron_zebra.report.folder import read_run
from megatron_zebra.report.run import read_evaluations, read_metrics
from megatron_zebra.training.metrics import MetricsFile
from tests.convert.models import FAMILIES, SMALL
from tests.convert.test_gguf import write as write_gguf
from tests.fuzzing.damage import damaged_bytes, damaged_tree, to_json
from tests.fuzzing.subject import Outcome, Trial

MODELS = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3-window": "smollm3", "cwm": "cwm",
    "granite-swa": "granite_swa",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_INDEX = "model.safetensors.index.json"


def prepare_huggingface(folder: Path) -> Trial:
    """config.json, the header of a safetensors file, the index of shards."""
    configs = {name: SMALL | FAMILIES[name][1] | {"model_type": model_type} for name, model_type in MODELS.items()}
    headers = {name: _tensors(folder / "config.json", config) for name, config in configs.items()}

    def trial(chance: random.Random) -> Outcome:
        name = chance.choice([*MODELS])
        config: Any = configs[name]
        header, size = headers[name]
        index: Any = {"weight_map": dict.fromkeys(header, SHARDS[0])}
        kind = chance.choice(("config", "config", "header", "header", "index", "bytes"))
        sound = to_json(header)
        if kind == "config":
            config = damaged_tree(chance, config)
        elif kind == "header":
            sound = to_json(damaged_tree(chance, header))
        elif kind == "index":
            index["weight_map"] |= dict.fromkeys([*header][5:], SHARDS[1])
            index = damaged_tree(chance, index)
        weights = struct.pack("<Q", len(sound)) + sound + bytes(size)
        if kind == "bytes":
            weights = damaged_bytes(chance, weights)
        for path in folder.iterdir():
            path.unlink()
        (folder / "config.json").write_bytes(to_json(config))
        if kind == "index":
            _write_shards(folder, header, size)
            (folder / SHARD_INDEX).write_bytes(to_json(index))
        else:
            (folder / WEIGHTS).write_bytes(weights)
        return _read_model(folder)

    return trial


def _tensors(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of that model, and the bytes of its data (all zero)."""
    arch = understand(file, config).architecture
    shapes = {their_name(name): shape for name, shape in arch.parameter_shapes().items()}
    if config["model_type"] == "granite_swa":
        shapes |= {sink_name(layer): (arch.num_heads,) for layer in range(arch.num_layers)}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header, position


def _write_shards(folder: Path, header: dict[str, Any], size: int) -> None:
    items = [*header.items()]
    for file, part in zip(SHARDS, (items[:5], items[5:])):
        text = to_json(dict(part))
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def _read_model(path: Path) -> Outcome:
    source = open_model(path)
    shapes = source.architecture.parameter_shapes()
    for name in source.names():
        values = source.read_tensor(name)
        assert values.numel() == torch.Size(shapes[name]).numel(), f"{name}: {values.shape}, promised {shapes[name]}"
    return "other"  # there is nothing to compare it with: no checksums


def prepare_gguf(folder: Path) -> Trial:
    """A GGUF file: bytes of its header, or a key of its metadata with another value."""
    arch = understand(folder / "config.json", SMALL | {"model_type": "llama"}).architecture
    tensors = {their_name(name): torch.zeros(shape) for name, shape in arch.parameter_shapes().items()}
    write_gguf(folder / "sound.gguf", tensors)
    sound = (folder / "sound.gguf").read_bytes()
    begin = sound.index(b"token_embd.weight")  # metadata, tensors, and then many zeros
    file = folder / "damaged.gguf"

    def trial(chance: random.Random) -> Outcome:
        if chance.random() < 0.3:
            more = _gguf_value(chance)  # where a key is twice, the last counts
            header = sound[:16] + struct.pack("<Q", struct.unpack_from("<Q", sound, 16)[0] + 1) + sound[24 : begin - 8]
            data = header + more + sound[begin - 8 :]
        else:
            part = chance.choice((begin, begin + 3000))
            data = damaged_bytes(chance, sound[:part]) + sound[part:]
        file.write_bytes(data)
        return _read_model(file)

    return trial


def _gguf_value(chance: random.Random) -> bytes:
    """A key that means something, with a value of any type."""
    text = b"\x07\0\0\0\0\0\0\0unknown"
    values = [
        (4, struct.pack("<I", chance.choice((0, 1, 3, 2**31, 2**32 - 1)))), (6, struct.pack("<f", chance.choice(FLOATS))),
        (8, text), (7, b"\1"), (9, struct.pack("<IQ", 8, 1) + text), (9, struct.pack("<IQ", 4, 0)), (10, b"\xff" * 8),
    ]  # fmt: skip
    key = chance.choice(GGUF_KEYS).encode()
    kind, value = chance.choice(values)
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


GGUF_KEYS = [
    "general.alignment",
    "general.architecture",
    "tokenizer.ggml.eos_token_id",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.context_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.sliding_window",
    "llama.expert_count",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
]
FLOATS = (0.0, -1.0, 1e-5, float("nan"), float("inf"))
MESSAGES: list[Any] = [
    {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}], "meta": {"a": 1}},
    {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
]
TEXTS: list[Any] = [{"text": "Some text.", "n": 1}, {"text": None}, {"text": "More \u6f22."}]
METRICS: list[Any] = [
    {"step": n, "loss": 2.5 / n, "mfu": None, "valid/a": 1.0, "learning_rate": 1e-3} for n in range(1, 6)
]
SETS = {"a": {"loss": 1.5, "edges": [0, 1, 2, 4], "loss_by_position": [3.0, None, 1.0]}}
EVALUATIONS: list[Any] = [{"step": n, "sets": SETS} for n in range(1, 4)]


def prepare_lines(folder: Path) -> Trial:
    """Conversations, documents, metrics.jsonl and evaluation.jsonl."""
    file = folder / "lines.jsonl"

    def trial(chance: random.Random) -> Outcome:
        kind, records = chance.choice(
            (("chat", MESSAGES), ("text", TEXTS), ("metrics", METRICS), ("evaluation", EVALUATIONS))
        )
        lines = [to_json(record if chance.random() < 0.5 else damaged_tree(chance, record)) for record in records]
        data = b"\n".join(lines) + b"\n"
        file.write_bytes(damaged_bytes(chance, data) if chance.random() < 0.4 else data)
        if kind in ("chat", "text"):
            _read_texts(file, kind)
        else:
            _read_records(file, kind)
        return "other"

    return trial


def prepare_report(folder: Path) -> Trial:
    """What a report reads of a run's folder."""
    result = {"sets": SETS}
    table = {"lengths": [16, 32], "depth_edges": [0, 0.5, 1], "exact": [[1, 0.5], [None, 0]]}
    sound: dict[str, Any] = {
        "environment.json": {"world_size": 2, "vocab_size": 256, "command": ["x"]},
        "evaluation/perplexity.json": result,
        "evaluation/answers.json": table,
        "evaluation/retrieval.json": {"tasks": {"needle": table, "copy": table}},
    }
    texts = {
        "config.yaml": (ROOT / "launch" / "recipes" / "debug.yaml").read_bytes(),
        "metrics.jsonl": b"".join(to_json(record) + b"\n" for record in METRICS),
        "evaluation.jsonl": b"".join(to_json(record) + b"\n" for record in EVALUATIONS),
    }
    texts |= {name: to_json(document) for name, document in sound.items()}
    (folder / "evaluation").mkdir()

    def trial(chance: random.Random) -> Outcome:
        for name, data in texts.items():
            (folder / name).write_bytes(data)
        name = chance.choice([*texts])
        data = texts[name]
        if name in sound and chance.random() < 0.7:
            data = to_json(damaged_tree(chance, sound[name]))
        else:
            data = damaged_bytes(chance, data)
        (folder / name).write_bytes(data)
        run = read_run(folder)
        assert run.stages.pp == 1
        return "same" if data == texts[name] else "other"

    return trial


def _read_texts(file: Path, kind: str) -> None:
    options = InputOptions()
    for chunk in read_chunks(find_files([file], options)[0], options):
        found: Iterator[Any] = conversations(chunk) if kind == "chat" else documents(chunk, options)
        for item in found:
            texts = [item] if isinstance(item, str) else [message["content"] for message in item.messages]
            assert "".join(texts).encode() is not None


def _read_records(file: Path, kind: str) -> None:
    if kind == "metrics":
        metrics = read_metrics(file)
        assert all(len(column) == len(metrics.steps) for column in metrics.columns.values())
        assert metrics.validation is not None
    else:
        for step, sets in read_evaluations(file):
            assert isinstance(step, int)
            assert all(len(found.edges) == len(found.loss) + 1 for found in sets.values())
    MetricsFile(file, 3).close()
    kept = [json.loads(line)["step"] for line in file.read_bytes().splitlines()]
    assert all(step <= 3 for step in kept), f"steps {kept} were kept, 3 was restored"
