"""Which layers are global: Zebra's rule, Megatron's ways to write it, and what is shown of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.config.sections import Model
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.model.pattern import from_megatron, layer_kinds, stripes

ZEBRA = ("global", "local", "local", "local")


def architecture(**keys: object) -> Architecture:
    return resolve(Model.model_validate({"num_layers": 8, "window_size": 9, **keys}), 100, 64)


def test_w04_windows_are_on_the_layers_that_zebra_says() -> None:
    """W04: 8 layers, L = 4: [full, local, local, local] * 2, explicit by global layer number."""
    arch = architecture(layer_group_size=4)
    assert arch.layer_kinds == ZEBRA * 2
    assert [arch.window(layer) for layer in range(8)] == [None, 9, 9, 9] * 2


def test_w05_megatrons_integer_is_not_zebras_order() -> None:
    """W05: an integer N makes the last layer of each N full; the list [0, 1, 1, 1] * 8 is Zebra's order."""
    assert from_megatron(4, 8) == ("local", "local", "local", "global") * 2
    assert from_megatron([0, 1, 1, 1] * 8, 32) == ZEBRA * 8 == layer_kinds(32, 4)
    assert from_megatron([0, 1, 1, 1] * 8, 32) != from_megatron(4, 32)
    with pytest.raises(ValueError, match="4 entries for 8 layers"):
        from_megatron([0, 1, 1, 1], 8)


@given(count=st.integers(1, 200), group=st.integers(1, 220))
def test_global_iff_the_number_is_a_multiple(count: int, group: int) -> None:
    kinds = layer_kinds(count, group)
    assert len(kinds) == count
    assert all((kind == "global") == (layer % group == 0) for layer, kind in enumerate(kinds))


def test_an_explicit_list_is_taken_as_it_is() -> None:
    kinds = ["local", "global", "global", "local", "local", "local", "local", "global"]
    assert list(architecture(layer_kinds=kinds, layer_group_size=2).layer_kinds) == kinds


def test_groups_of_one_are_all_global() -> None:
    assert set(architecture(layer_group_size=1).layer_kinds) == {"global"}


def test_an_architecture_comes_back_from_what_json_holds() -> None:
    arch = architecture(
        rope={"scaling": "dynamic", "original_length": 16}, rope_local={"theta": 1e5}, tie_embeddings=True
    )
    assert Architecture.from_dict(arch.to_dict()) == arch
    assert arch.rope["global"].length == 64
    assert arch.rope["local"].length is None


def test_stripes_show_each_layer_once() -> None:
    text = stripes(layer_kinds(130, 4), 512)
    assert text.count("█") == 33 + 1
    assert text.count("░") == 97 + 1
    assert [line.split()[1] for line in text.splitlines()[:3]] == ["0", "64", "128"]
    assert "33 global" in text
    assert "97 local (itself and 512 keys before)" in text
