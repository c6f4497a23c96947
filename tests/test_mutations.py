"""The faults of tests/mutate.py still fit the sources (the script itself runs them; it takes minutes)."""

import pytest

from tests.mutate import MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_string_is_there_once(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert mutated(text, mutation) != text
