"""A run that begins from a model: open keys are the model's, given ones are compared with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pretrain_zebra
from megatron_zebra.config.load import load_config, to_yaml
from megatron_zebra.config.sections import Config, Rope
from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.training.adopt import FIXED, adopt, adopted, changes, merged_rope

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 512},
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 64, "rope_parameters": {"rope_theta": 1e4}}


def folder(path: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder of which a dry run reads the configuration alone."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def configured(load: Path | None, **keys: Any) -> Config:
    given: dict[str, Any] = {"data.synthetic.documents": 50, "checkpoint.load_part": "weights"}
    given |= {"checkpoint.load": str(load)} if load else {}
    return load_config(None, given | {name.replace("__", "."): value for name, value in keys.items()})


def architecture(config: Config) -> Architecture:
    return resolve(config.model, 0, config.data.sequence_length)


def begun(tmp_path: Path, theirs: dict[str, Any] = LLAMA, **keys: Any) -> Config:
    return adopted(configured(folder(tmp_path / "hf", theirs), **keys), tmp_path / "run")


@pytest.mark.parametrize("theirs", [LLAMA, MISTRAL])
def test_a_configuration_that_gives_nothing_is_the_model(tmp_path: Path, theirs: dict[str, Any]) -> None:
    config = begun(tmp_path, theirs)
    source = architecture_of(tmp_path / "hf")
    assert architecture(config) == source
    assert changes(config, source) == []
    assert adopted(configured(None), tmp_path) == configured(None)


def test_what_is_given_replaces_pattern_window_and_rope_in_part(tmp_path: Path) -> None:
    keys = {"model__layer_group_size": 2, "model__window_size": 16, "model__rope__factor": 32.0}
    config = begun(tmp_path, **keys, data__sequence_length=16384)
    source, arch = architecture_of(tmp_path / "hf"), architecture(config)
    assert arch.layer_kinds == ("global", "local", "global", "local")
    rope = source.rope["global"].model_copy(update={"factor": 32.0})
    assert arch == replace(
        source, layer_kinds=arch.layer_kinds, window_size=16, rope={"global": rope, "local": rope}, max_length=16384
    )
    assert changes(config, source) == [
        "layers: GlGl, the loaded model has GGGG (G global, l local)",
        "window_size: 16, the loaded model has none",
        "rope of global layers: factor 32.0; the loaded model has factor 8.0",
        "rope of local layers: factor 32.0; the loaded model has factor 8.0",
    ]
    # The resolved configuration is the same run again, over the model it began from and over its own.
    again = load_config(_written(tmp_path / "config.yaml", config), {})
    assert adopted(again, tmp_path / "run") == config
    assert adopt(configured(None, **keys).model, arch, 16384)[0] == config.model


def _written(file: Path, config: Config) -> Path:
    file.write_text(to_yaml(config))
    return file


def test_a_pattern_alone_or_a_window_alone(tmp_path: Path) -> None:
    assert architecture(begun(tmp_path, MISTRAL, model__layer_group_size=4)).window_size == 63
    config = begun(tmp_path, MISTRAL, model__window_size=7)
    assert architecture(config).layer_kinds == ("local",) * 4
    assert changes(config, architecture_of(tmp_path / "hf")) == ["window_size: 7, the loaded model has 63"]
    kinds = ["local", "global", "global", "local"]
    assert architecture(begun(tmp_path, model__layer_kinds=kinds)).layer_kinds == tuple(kinds)


def test_a_rope_of_local_layers(tmp_path: Path) -> None:
    arch = architecture(begun(tmp_path, model__rope_local={"scaling": "none", "theta": 7.0}))
    assert arch.rope["local"] == Rope(theta=7.0)
    assert arch.rope["global"] == architecture_of(tmp_path / "hf").rope["global"]
    apart = replace(architecture_of(tmp_path / "hf"), rope=arch.rope)
    changed, _ = adopt(configured(None, model__rope__theta=9.0).model, apart, 100)
    assert changed.rope.theta == 9.0
    assert changed.rope_local == arch.rope["local"]  # a source's own is kept


def test_another_scaling_begins_from_theta_and_the_original_length(tmp_path: Path) -> None:
    source = architecture_of(folder(tmp_path / "hf", LLAMA))
    assert merged_rope(Rope(scaling="yarn", factor=4.0), source, "global") == Rope(
        theta=5e5, scaling="yarn", factor=4.0, original_length=512
    )
    assert merged_rope(Rope(scaling="none"), source, "global") == Rope(theta=5e5)
    plain = architecture_of(folder(tmp_path / "hf2", MISTRAL))
    assert merged_rope(Rope(scaling="yarn", factor=4.0), plain, "global").original_length == 4096
    assert merged_rope(Rope(scaling="linear", factor=4.0), plain, "global").original_length is None
    assert merged_rope(None, source, "local") == source.rope["local"]


def test_max_length_is_the_longer_of_both(tmp_path: Path) -> None:
    for length, want in ((2048, 4096), (8192, 8192)):
        assert begun(tmp_path, data__sequence_length=length).model.max_length == want
    assert begun(tmp_path, model__max_length=100).model.max_length == 100


OTHER = {
    "hidden_size": 64,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "ffn_hidden_size": 96,
    "vocab_size": 103,
    "tie_embeddings": False,
    "qkv_bias": True,
    "qk_norm": True,
    "norm_eps": 1e-5,
}


def test_what_must_not_differ_is_a_line_each(tmp_path: Path) -> None:
    assert set(OTHER) == set(FIXED)
    with pytest.raises(UserError) as caught:
        begun(tmp_path, **{f"model__{name}": value for name, value in OTHER.items()})
    lines = str(caught.value).split("\nerror: ")
    assert len(lines) == len(OTHER)
    assert f"model.hidden_size = 64: must be 32, as the model of checkpoint.load = {tmp_path / 'hf'} has" in lines
    assert any(line.startswith("model.tie_embeddings = false: must be true, ") for line in lines)


def test_no_model_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "no", "holds no model"), (tmp_path / "empty", "holds no model")):
        with pytest.raises(UserError) as caught:
            adopted(configured(path), tmp_path / "run")
        assert str(caught.value).startswith(f"checkpoint.load = {path}: {says}")
        assert "\n" not in str(caught.value)


def test_the_dry_run_needs_no_weights_and_shows_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = folder(tmp_path / "hf", LLAMA)
    words = ["--checkpoint.load", str(hf), "--data.synthetic.documents", "50", "--model.layer_group_size", "4"]
    words += ["--training.distill.teacher", str(hf), "--logging.run_dir", str(tmp_path / "run"), "--dry-run"]
    assert pretrain_zebra.main(words) == 0
    out = capsys.readouterr().out
    assert f"# begins from {hf}\n  layers: Glll, the loaded model has GGGG" in out
    assert "window_size: 512, the loaded model has none" in out
    assert "has no moments: its weights alone are loaded" in out
    assert "  hidden_size: 32\n" in out
    assert "\n  teacher " in out
    for more, says in (
        (["--parallel.tp", "3", "--world-size", "3"], "parallel.tp = 3"),
        (
            ["--training.distill.teacher", str(folder(tmp_path / "other", LLAMA | {"vocab_size": 99}))],
            "vocabulary of 99",
        ),
        (["--training.distill.teacher", str(tmp_path / "no")], "training.distill.teacher = "),
    ):
        assert pretrain_zebra.main([*words, *more]) == 2
        assert says in capsys.readouterr().err
