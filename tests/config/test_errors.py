"""Every mistake that the configuration can see is one line: the key as it is written, the value, what is allowed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.attention.registry import BACKENDS
from megatron_zebra.config import check
from megatron_zebra.config.load import load_config, parse_words
from megatron_zebra.errors import UserError

GOOD = {"data.synthetic.documents": 100, "model.vocab_size": 64}


def complaints(overrides: dict[str, Any], world_size: int = 1, file: Path | None = None) -> list[str]:
    """What pretrain_zebra.py would print after ``error: ``."""
    try:
        return check.problems(load_config(file, GOOD | overrides), world_size)
    except UserError as error:
        return str(error).split("\nerror: ")


def test_a_good_configuration_has_none() -> None:
    assert complaints({}) == []
    assert complaints({}, world_size=8) == []


SINGLE = [
    # (key, value, what the line says after the key)
    ("model.hiden_size", 64, "no such key; perhaps model.hidden_size"),
    ("hidden_size", 64, "no such key; perhaps model.hidden_size"),
    ("training.window_size", 64, "no such key; perhaps model.window_size"),
    ("optimzer.beta1", 0.9, "no such key; perhaps optimizer"),
    ("foo.beta1", 0.9, "no such key; allowed here: model, parallel"),
    ("model.window_size", 0, "= 0: must be greater than or equal to 1 (allowed: >= 1"),
    ("model.window_size", -1, "= -1: must be greater than or equal to 1"),
    ("model.window_size", 2.5, "= 2.5: must be a valid integer"),
    ("model.window_size", True, "= true: must be a valid integer"),
    ("model.window_size", None, "= null: must be a valid integer"),
    ("model.window_size", [5, 0], "= [5, 0]: must be a valid integer"),
    ("model.hidden_size", "64", "= '64': must be a valid integer"),
    ("model.num_layers", 10**11, "= 100000000000: must be less than or equal to 10000"),
    ("model.layer_kinds", ["global", "locl"], "[1] = 'locl': must be 'global' or 'local' (allowed: global, local)"),
    ("model.rope", 3, "= 3: must be a section"),
    ("model.rope_local", "none", "= 'none': must be a section"),
    ("model.rope.scaling", "ntk", "= 'ntk': must be 'none', 'linear', 'dynamic', 'yarn' or 'llama3'"),
    ("model.rope.theta", float("nan"), "= nan: must be a finite number (allowed: > 1.0)"),
    ("model.tie_embeddings", 1, "= 1: must be a valid boolean"),
    ("optimizer.learning_rate", float("inf"), "= inf: must be a finite number (allowed: > 0)"),
    ("optimizer.learning_rate", 10**400, "must be a valid number (allowed: > 0)"),
    ("optimizer.zero_stage", 4, "= 4: must be 0, 1, 2 or 3"),
    ("optimizer.zero_stage", True, "= true: must be a whole number (allowed: 0, 1, 2, 3)"),
    ("training.precision", "fp16", "= 'fp16': must be 'fp32' or 'bf16' (allowed: fp32, bf16)"),
    ("training.freeze", ["heads"], "[0] = 'heads': must be 'embedding', 'head', 'attention', 'mlp' or 'norms'"),
    ("training.lora.targets", ["q"], "[0] = 'q': must be 'q_proj', 'k_proj'"),
    ("training.distill.weight", 1.5, "= 1.5: must be less than or equal to 1"),
    ("training.recompute", "some", "= 'some': must be 'none', 'attention' or 'full'"),
    ("checkpoint.mirror", "", "= '': must not be empty"),
    ("data.split", [1.0], "= [1.0]: must have at least 3 values"),
    ("data.split", [1.0, -1.0, 0.0], "[1] = -1.0: must be greater than or equal to 0"),
    ("data.valid", [""], "[0].prefix = '': must not be empty"),
    ("data.valid", [{"weight": 2}], "[0].prefix: is missing"),
    ("data.valid", [{"prefix": "x", "wieght": 2}], "[0].wieght: no such key; perhaps data.valid[].weight"),
    ("training.batch_ramp", [{"steps": 5}], "[0].global_batch_size: is missing"),
    ("training.profile_steps", [0, 2], "= [0, 2]: steps must be at least 1"),
    ("training.memory_snapshot_steps", [0], "= [0]: steps must be at least 1"),
    ("training.profile_steps", [1, 2, 3], "= [1, 2, 3]: must have at most 2 values"),
    ("logging.run_dir", 5, "= 5: must be a valid string"),
    ("deepspeed", 5, "= 5: must be a section"),
]


@pytest.mark.parametrize(("key", "value", "says"), SINGLE, ids=[f"{key}={str(value)[:20]}" for key, value, _ in SINGLE])
def test_a_wrong_key_or_value(key: str, value: Any, says: str) -> None:
    lines = complaints({key: value})
    assert len(lines) == 1
    shown = key.split(".")[0] if key.startswith(("foo", "optimzer")) else key
    assert lines[0].startswith(shown)
    assert says in lines[0]
    assert "\n" not in lines[0]


BETWEEN = [
    # (overrides, world size, the keys that the line names)
    ({"model.hidden_size": 66, "model.num_heads": 4}, 1, ["model.hidden_size = 66", "model.num_heads = 4"]),
    ({"model.hidden_size": 12, "model.num_heads": 4}, 1, ["model.head_dim = 3", "even"]),
    ({"model.num_heads": 8, "model.num_kv_heads": 3}, 1, ["model.num_kv_heads = 3", "model.num_heads = 8"]),
    ({"model.layer_kinds": ["global"]}, 1, ["model.layer_kinds", "model.num_layers = 8"]),
    ({"model.rope.scaling": "yarn"}, 1, ["model.rope.original_length = null"]),
    ({"model.rope.factor": 2.0}, 1, ["model.rope.factor = 2.0", "model.rope.scaling"]),
    ({"data.synthetic.documents": 0}, 1, ["data.train = []", "data.synthetic.documents"]),
    ({"data.train": ["x"]}, 1, ["data.synthetic.documents = 100", "data.train"]),
    ({"model.vocab_size": None}, 1, ["model.vocab_size = null"]),
    ({"data.split": [0.0, 1.0, 0.0]}, 1, ["data.split = [0.0, 1.0, 0.0]"]),
    ({"training.global_batch_size": 7}, 2, ["training.global_batch_size = 7", "multiple"]),
    ({"training.global_batch_size": 2}, 4, ["training.global_batch_size = 2", "feeds at most 2 processes", "not 4"]),
    ({"training.global_batch_size": 2, "parallel.tp": 2}, 8, ["= 2: feeds at most 2 data-parallel ranks", "not 4"]),
    ({"training.micro_batch_size": 3}, 1, ["training.global_batch_size = 8", "3"]),
    (
        {"parallel.tp": 2, "parallel.cp": 3, "data.sequence_length": 1536},
        8,
        ["parallel.tp x cp x pp = 2 x 3 x 1 = 6", "8 processes", "1, 2, 4, 8", "6 or 12"],
    ),
    ({"parallel.pp": 2}, 1, ["parallel.tp x cp x pp = 1 x 1 x 2 = 2", "the 1 process ", "2 processes"]),
    (
        {"parallel.tp": 3, "model.ffn_hidden_size": 96, "data.sequence_length": 1536},
        3,
        ["parallel.tp = 3", "model.num_heads = 8", "allowed: 1, 2, 4, 8)"],
    ),
    (
        {
            "parallel.tp": 4,
            "model.num_heads": 12,
            "model.num_kv_heads": 6,
            "model.hidden_size": 48,
            "model.ffn_hidden_size": 96,
        },
        4,
        ["parallel.tp = 4", "model.num_kv_heads = 6", "allowed: 1, 2, 3, 6, 12)"],
    ),
    (
        {"parallel.tp": 4, "model.ffn_hidden_size": 98},
        4,
        ["parallel.tp = 4", "model.ffn_hidden_size = 98", "allowed: 1, 2)"],
    ),
    (
        {
            "parallel.tp": 4,
            "model.num_heads": 4,
            "model.ffn_hidden_size": None,
            "model.hidden_size": 24,
            "parallel.cp_head_groups": 2,
        },
        4,
        ["parallel.cp_head_groups = 2", "1 KV head ", "allowed: 1)"],
    ),
    (
        {"parallel.cp": 3, "training.global_batch_size": 8},
        3,
        ["data.sequence_length = 2048", "multiple of 6", "2046 or 2052"],
    ),
    (
        {"parallel.cp": 3, "parallel.cp_order": "contiguous"},
        3,
        ["data.sequence_length = 2048", "multiple of 3", "2046 or 2049"],
    ),
    (
        {"parallel.cp": 2, "parallel.tp": 4, "data.sequence_length": 20},
        8,
        ["data.sequence_length = 20", "multiple of 8", "tp = 4", "16 or 24"],
    ),
    (
        {"parallel.tp": 2, "data.sequence_schedule": [{"steps": 5, "sequence_length": 3}]},
        2,
        ["data.sequence_schedule[0].sequence_length = 3", "2 or 4"],
    ),
    ({"parallel.cp_head_groups": 3}, 1, ["parallel.cp_head_groups = 3", "8 KV heads", "allowed: 1, 2, 4, 8)"]),
    (
        {"parallel.pp": 9, "training.global_batch_size": 9},
        9,
        ["parallel.pp = 9", "9 stages", "model.num_layers = 8", "1 to 8"],
    ),
    (
        {"parallel.pp": 5, "parallel.pp_schedule": "interleaved"},
        5,
        ["parallel.pp = 5", "10 stages (2 a rank)", "1 to 4"],
    ),
    ({"parallel.pp": 2, "parallel.pp_layers": [8]}, 2, ["parallel.pp_layers", "1 stages", "2 x 1 = 2"]),
    ({"parallel.pp": 2, "parallel.pp_layers": [8, 0]}, 2, ["parallel.pp_layers[1] = 0", "at least 1"]),
    (
        {"parallel.pp": 2, "parallel.pp_layers": [4, 5]},
        2,
        ["parallel.pp_layers = [4, 5]", "model.num_layers = 8", "not 9"],
    ),
    (
        {"parallel.pp": 2, "parallel.pp_stages_per_rank": 2},
        2,
        ["parallel.pp_stages_per_rank = 2", "1f1b", "allowed: 1)"],
    ),
    (
        {"parallel.pp_stages_per_rank": 1, "parallel.pp_schedule": "interleaved"},
        1,
        ["parallel.pp_stages_per_rank = 1", "interleaved", "2 or more"],
    ),
    (
        {"parallel.pp_stages_per_rank": 3, "parallel.pp_schedule": "zero_bubble"},
        1,
        ["parallel.pp_stages_per_rank = 3", "zero_bubble", "allowed: 2)"],
    ),
    *[
        (
            {"parallel.pp": 2, "optimizer.zero_stage": stage},
            2,
            [f"optimizer.zero_stage = {stage}", "parallel.pp = 2", "1 with any pp; 0, 1, 2, 3 with pp = 1"],
        )
        for stage in (0, 2, 3)
    ],
    (
        {"parallel.pp": 4},
        16,
        ["training.global_batch_size = 8", "2 micro-batches", "parallel.pp = 4", "allowed: 16 and more"],
    ),
    (
        {"parallel.pp": 2, "training.batch_ramp": [{"steps": 5, "global_batch_size": 1}]},
        2,
        ["training.batch_ramp[0].global_batch_size = 1", "1 micro-batch;", "allowed: 2 and more"],
    ),
    (
        {"parallel.pp": 2, "parallel.pp_schedule": "interleaved", "training.global_batch_size": 14},
        4,
        ["training.global_batch_size = 14", "7 micro-batches", "3 equal rounds", "nearest: 12 or 16"],
    ),
    (
        {"optimizer.offload": True, "optimizer.zero_stage": 0},
        1,
        ["optimizer.offload = true", "optimizer.zero_stage = 1, 2 or 3"],
    ),
    (
        {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}},
        1,
        ["deepspeed.zero_optimization.offload_optimizer", "optimizer.offload"],
    ),
    ({"optimizer.min_learning_rate": 1.0}, 1, ["optimizer.min_learning_rate = 1.0", "optimizer.learning_rate"]),
    ({"deepspeed.zero_optimization.stage": 2}, 1, ["deepspeed.zero_optimization.stage", "optimizer.zero_stage"]),
    ({"deepspeed.gradient_clipping": 2}, 1, ["deepspeed.gradient_clipping", "optimizer.clip_grad"]),
    ({"data.valid": ["a/x", "b/x"]}, 1, ["data.valid", "'x'"]),
    (
        {"training.freeze": ["head"], "model.tie_embeddings": True},
        1,
        ["training.freeze: head", "model.tie_embeddings = true", "write embedding"],
    ),
    (
        {"training.freeze": ["embedding", "attention", "mlp", "norms"], "model.tie_embeddings": True},
        1,
        ["training.freeze", "nothing to train"],
    ),
    (
        {"training.freeze": ["attention", "mlp", "norms"], "parallel.pp": 2},
        2,
        ["training.freeze", "attention, mlp or norms", "parallel.pp = 2"],
    ),
    ({"training.freeze": ["mlp"], "training.lora.rank": 4}, 1, ["training.freeze = ['mlp']", "training.lora.rank = 4"]),
    ({"training.lora.targets": [], "training.lora.rank": 4}, 1, ["training.lora.targets = []", "at least one"]),
    (
        {"training.distill.teacher": "x", "parallel.pp": 2},
        2,
        ["training.distill.teacher", "parallel.pp = 2", "allowed: 1"],
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "names"), BETWEEN, ids=[str(b[0])[:40] for b in BETWEEN])
def test_a_rule_between_keys(overrides: dict[str, Any], world_size: int, names: list[str]) -> None:
    lines = complaints(overrides, world_size)
    assert len(lines) == 1
    for name in names:
        assert name in lines[0]


def test_context_parallelism_refuses_a_backend_without_fewer_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    able = complaints({"parallel.cp": 2, "model.attention_backend": "cpu"}, 2)
    unable = dataclasses.replace(BACKENDS["cpu"], fewer_queries=False)
    monkeypatch.setitem(BACKENDS, "cpu", unable)
    (line,) = complaints({"parallel.cp": 2, "model.attention_backend": "cpu"}, 2)
    assert able == complaints({"model.attention_backend": "cpu"}) == []
    for says in ("model.attention_backend = cpu", "parallel.cp = 2", "auto, flash, torch, reference"):
        assert says in line


DEBUG = Path(__file__).parents[2] / "launch" / "recipes" / "debug.yaml"
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]


@pytest.mark.parametrize(("tp", "cp", "pp"), LAYOUTS)
def test_debug_yaml_goes_with_every_layout_of_eight(tp: int, cp: int, pp: int) -> None:
    layout = {"parallel.tp": tp, "parallel.cp": cp, "parallel.pp": pp}
    for world_size in (tp * cp * pp, 8):
        assert check.problems(load_config(DEBUG, layout), world_size) == []


def test_debug_yaml_goes_with_odd_numbers_under_three_ranks() -> None:
    odd = {"model.num_layers": 6, "model.layer_group_size": 3, "model.window_size": 37, "data.sequence_length": 384}
    for parallel in ({"parallel.cp": 3}, {"parallel.pp": 3}, {"parallel.cp": 3, "parallel.cp_order": "contiguous"}):
        assert check.problems(load_config(DEBUG, odd | parallel), 3) == []


def test_several_mistakes_are_several_lines() -> None:
    lines = complaints({"model.window_size": 0, "training.precision": "fp8", "model.x": 1})
    assert len(lines) == 3


FILES = [
    (b"- a\n- b\n", "must be a mapping of sections, not list"),
    (b"hello", "must be a mapping of sections, not str"),
    (b"model:\n\thidden_size: 3\n", "line 2: found character"),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
    (b"model:\n  hidden_size: 64\n  hidden_size: 64\n", "line 3: key 'hidden_size' is written twice"),
    (b"model: 7\n", "model = 7: must be a section"),
    (b"model: {a: 1}\n---\nmodel: {}\n", "expected a single document"),
    (b"a: &a [*a]\n", "recursive"),
    (b"1: 2\n", "key 1 is not a name"),
    (b"model: !!python/object:os.system {}\n", "could not determine a constructor"),
    (b"a: " + b"[" * 5000, "is nested too deeply"),
    (b"a: " + b"9" * 5000, "has a value that cannot be read"),
    (b"a: 2024-13-45", "has a value that cannot be read"),
    (b'logging: {run_dir: "a\\0b"}', "NUL"),
    (b'"a\\nb": 3', "a?b: no such key"),
    (b"x: |\n " + b"a" * (1 << 20), "is larger than 1 MiB"),
    (
        b"a0: &a0 [x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
        "aliases",
    ),
]


@pytest.mark.parametrize(("content", "says"), FILES, ids=[f[1][:30] for f in FILES])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(file, {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", Path("x" * 5000)):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path, {})


@pytest.mark.parametrize(
    "words",
    [
        ["foo"], ["-x"], ["--"], ["--."], ["--model..x", "3"], ["--training.steps"], ["--training.steps", "--dry-run"],
        ["--config"], ["--dry-run=3"], ["--world-size", "0"], ["--world-size", "²"], ["--world-size", "two"], ["--world-size", "9999999"],
        ["--world-size", "9" * 5000], ["--deepspeed.x", "[1"], ["--data.train", "{"], ["--training.steps", "!!x 3"],
    ],
)  # fmt: skip
def test_words_that_are_no_option(words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_words(words)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_value_below_what_is_no_section() -> None:
    line = parse_words(["--model.hidden_size", "3", "--model.hidden_size.x", "3"])
    with pytest.raises(UserError, match=r"--model.hidden_size.x: model.hidden_size is not a section"):
        load_config(None, line.overrides)


def test_a_window_as_long_as_the_sequence_is_a_warning() -> None:
    def told(**keys: Any) -> list[str]:
        return check.warnings(
            load_config(None, GOOD | {name.replace("__", "."): value for name, value in keys.items()})
        )

    assert told() == []
    (line,) = told(model__window_size=2048)
    assert "model.window_size = 2048" in line
    assert "data.sequence_length = 2048" in line
    assert told(model__window_size=2047) == []
    assert told(model__window_size=4096, model__layer_group_size=1) == []
