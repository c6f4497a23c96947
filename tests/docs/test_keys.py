"""Every key that a page names exists and takes the value beside it; every piece of YAML is a configuration."""

from pathlib import Path

import pytest

from megatron_zebra.config.help import all_keys
from megatron_zebra.config.load import load_config, parse_words
from tests.docs.pages import PAGES, Block, blocks, named, prose

KEYS = {key.path for key in all_keys()}
NAMED = sorted({(page.name, *pair) for page in PAGES for pair in named(prose(page))}, key=str)


@pytest.mark.parametrize(("page", "key", "value"), NAMED)
def test_keys_exist_and_take_their_values(page: str, key: str, value: str | None) -> None:
    assert key in KEYS | {path.rsplit(".", 1)[0] for path in KEYS}, page
    if value is not None:
        load_config(None, parse_words([f"--{key}", value]).overrides)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "yaml")], ids=lambda block: block.page
)
def test_yaml_is_a_configuration(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(block.text)
    load_config(tmp_path / "page.yaml", {})


def test_there_are_many() -> None:
    assert len(NAMED) > 150
