"""Values: where they come from, how they are written, and that they come back."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.config.load import load_config, parse_words, to_yaml
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def from_words(*words: str) -> Config:
    line = parse_words(words)
    return load_config(line.config, line.overrides)


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {steps: 7, seed: 8}\nmodel: {rope: {theta: 5e5, scaling: linear, factor: 2}}\n")
    config = from_words("--config", str(file), "--training.seed", "9", "--model.rope.factor=4")
    assert (config.training.global_batch_size, config.training.steps, config.training.seed) == (8, 7, 9)
    assert (config.model.rope.theta, config.model.rope.scaling, config.model.rope.factor) == (5e5, "linear", 4.0)


def test_of_a_key_given_twice_the_last_counts() -> None:
    assert from_words("--training.steps", "1", "--training.steps", "2").training.steps == 2


def test_a_section_given_at_once_replaces_the_files(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {rope: {theta: 5e5}}")
    config = from_words("--config", str(file), "--model.rope", "{scaling: linear, factor: 2}")
    assert config.model.rope.theta == 10000.0
    assert config.model.rope.factor == 2.0


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "1e-03", ".001", "0.001", "+1e-3", "1_0e-4"])
def test_numbers_as_people_write_them(text: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"optimizer: {{learning_rate: {text}}}")
    assert load_config(file, {}).optimizer.learning_rate == pytest.approx(1e-3)
    assert from_words("--optimizer.learning_rate", text).optimizer.learning_rate == pytest.approx(1e-3)
    assert from_words("--optimizer.learning_rate", "1").optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("false", False), ("yes", True), ("off", False), ("True", True)]
)
def test_booleans(word: str, value: bool) -> None:
    assert from_words("--model.tie_embeddings", word).model.tie_embeddings is value


def test_null_lists_and_mappings() -> None:
    config = from_words(
        "--model.rope_local", "null", "--data.split", "[1, 0, 0]", "--model.layer_kinds", "[global, local]",
        "--data.train", "[a, {prefix: b, weight: 2}]", "--data.valid", "held/out", "--model.num_kv_heads", "~",
    )  # fmt: skip
    assert config.model.rope_local is None
    assert config.model.num_kv_heads is None
    assert config.data.split == [1.0, 0.0, 0.0]
    assert config.model.layer_kinds == ["global", "local"]
    assert [(source.prefix, source.weight) for source in config.data.train] == [("a", 1.0), ("b", 2.0)]
    assert config.data.valid[0].prefix == "held/out"


def test_a_null_section_is_its_defaults_and_takes_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, "model:\ntraining: ~\n")
    config = from_words("--config", str(file), "--model.rope_local.theta", "5e5")
    assert config.model.rope_local is not None
    assert config.model.rope_local.theta == 5e5
    assert config.training == Config().training


def test_anchors_and_merges(tmp_path: Path) -> None:
    file = write(tmp_path, "model:\n  rope: &r {theta: 5e5}\n  rope_local: {<<: *r, scaling: linear, factor: 2}\n")
    model = load_config(file, {}).model
    assert model.rope_local is not None
    assert (model.rope.theta, model.rope_local.theta, model.rope_local.factor) == (5e5, 5e5, 2.0)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "---\n", "{}"):
        assert load_config(write(tmp_path, text), {}) == Config()
    assert load_config(None, {}) == Config()


def test_the_recipes_load() -> None:
    recipes = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(recipe, {})


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12) | st.sampled_from(
    ["1e3", "1e-3", "null", "yes", "0x1f", "1:30", "2024-01-01", ".5", "-", "~", "é ü", "a: b", "#", "1_0", "<<", "="]
)


@given(
    steps=st.integers(1, 10**12),
    rate=st.floats(1e-12, 1e3),
    run_dir=TEXTS,
    project=TEXTS,
    kinds=st.none() | st.lists(st.sampled_from(["global", "local"]), max_size=5),
    train=st.lists(TEXTS, max_size=3),
    deepspeed=st.dictionaries(
        TEXTS.filter(lambda t: t != "<<"),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    ),
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back_equal(
    tmp_path_factory: Any, steps: int, rate: float, run_dir: str, project: str, kinds: Any, train: Any, deepspeed: Any
) -> None:
    tree = {
        "training": {"steps": steps},
        "optimizer": {"learning_rate": rate},
        "logging": {"run_dir": run_dir, "wandb": {"project": project}},
        "model": {"layer_kinds": kinds},
        "data": {"train": train},
        "deepspeed": deepspeed,
    }
    config = Config.model_validate(tree)
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file, {}) == config


@given(
    words=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["--config", "--model", "--data.train", "--help", "--dry-run", "[", "{"]),
        max_size=6,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_words_give_a_configuration_or_a_user_error(words: list[str]) -> None:
    with contextlib.suppress(UserError):
        from_words(*words)


@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
@settings(max_examples=200, deadline=None)
def test_any_file_gives_a_configuration_or_a_user_error(tmp_path_factory: Any, text: str) -> None:
    file = tmp_path_factory.mktemp("any") / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    lines: list[str] = []
    try:
        load_config(file, {})
    except UserError as error:
        lines = str(error).split("\n")
    assert all(line.isprintable() for line in lines)
