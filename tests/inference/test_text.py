"""Text as it comes: whole characters, stop strings across tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.inference.text import Streamed


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; only what is streamed needs it to know."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def streamed(text: str, stops: Sequence[str] = (), prompt: str = "é") -> tuple[list[str], Streamed]:
    stream = Streamed(Bytes(), list(prompt.encode()), stops)  # type: ignore[arg-type]
    return [stream.add(byte) for byte in text.encode()], stream


@given(text=st.text(alphabet="abé漢🦓 ", max_size=30), prompt=st.text(alphabet="aé🦓", min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_whole_characters_and_all_of_them(text: str, prompt: str) -> None:
    parts, stream = streamed(text, prompt=prompt)
    assert "".join(parts) + stream.rest() == text
    assert all("\ufffd" not in part for part in parts)


@given(
    text=st.text(alphabet="ab", max_size=20), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=200, deadline=None)
def test_nothing_of_a_stop_string_is_shown(text: str, stops: list[str]) -> None:
    parts, stream = streamed(text, stops)
    shown = "".join(parts) + stream.rest()
    # The stop that is complete first ends the text; of those complete at once, the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize("text", ["abc", "ab"])
def test_a_stop_string_never_met_loses_nothing(text: str) -> None:
    parts, stream = streamed(text, ["abd", "bcc"])
    assert "".join(parts) + stream.rest() == text


def test_a_stop_string_before_half_a_character_is_met_at_the_end() -> None:
    class Halves(Bytes):
        def decode(self, ids: Sequence[int]) -> str:
            return b"".join(b"END\xe2" if one == 0 else bytes([one]) for one in ids).decode(errors="replace")

    stream = Streamed(Halves(), [97], ["END"])  # type: ignore[arg-type]
    assert [stream.add(98), stream.add(0), stream.rest()] == ["b", "", ""]
    assert stream.stopped
