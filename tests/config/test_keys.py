"""The list of keys is frozen: none grows, goes or is renamed unseen, and the documentation has them all."""

from megatron_zebra.config.help import all_keys, help_text
from tests.config.generate import KEYS, PAGE, key_list, page_with_tables

HOW = "to accept the change: python -m tests.config.generate"


def test_no_key_changed_unseen() -> None:
    assert key_list() == KEYS.read_text(), HOW


def test_the_documentation_has_the_same_keys() -> None:
    assert page_with_tables(PAGE.read_text()) == PAGE.read_text(), HOW


def test_keys_that_scripts_rely_on() -> None:
    paths = {key.path for key in all_keys()}
    fixed = {
        "model": ("hidden_size", "num_layers", "layer_group_size", "window_size"),
        "data": ("sequence_length",),
        "parallel": ("tp", "cp", "pp"),
        "optimizer": ("zero_stage",),
        "training": ("steps", "global_batch_size", "micro_batch_size", "seed", "precision"),
        "logging": ("run_dir",),
    }
    assert {f"{section}.{name}" for section, names in fixed.items() for name in names} <= paths


def test_help_teaches_every_key() -> None:
    text = help_text()
    for key in all_keys():
        assert f"--{key.path}  <{key.kind}>" in text
        assert key.description, key.path
        assert key.default or key.path.count("[]"), key.path
    assert "in tokens" in text
    assert "allowed: none, attention, full" in text
