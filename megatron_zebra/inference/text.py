"""From new tokens to the text that can be shown: whole characters, and nothing past a stop string."""

from collections.abc import Sequence

from megatron_zebra.data.tokenizer import Tokenizer

_CONTEXT = 8  # tokens of the prompt that decide how the first new one is written (a space before it, half a character)


class Streamed:
    """The text of one sequence, as its tokens come. ``stopped``: a stop string was met; what comes after it is dropped.

    A token may end within a character, and text may be the beginning of a stop string: such text is held back until it is
    known, or until ``rest``.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(prompt[-_CONTEXT:])
        self.before, self.read = 0, len(self.ids)  # ids[before:read] are the context of those not yet written
        self.held, self.stopped = "", False

    def add(self, token: int) -> str:
        """Take the next token; the text that is now certain."""
        if self.stopped:
            return ""
        self.ids.append(token)
        context = self.tokenizer.decode(self.ids[self.before : self.read])
        text = self.tokenizer.decode(self.ids[self.before :])
        if text.endswith("\ufffd"):  # in the middle of a character
            return ""
        self.before, self.read = self.read, len(self.ids)
        self.held += text[len(context) :]
        return self._certain()

    def rest(self) -> str:
        """What was held back, at the end of the sequence."""
        if self.stopped:
            return ""
        context = self.tokenizer.decode(self.ids[self.before : self.read])
        self.held += self.tokenizer.decode(self.ids[self.before :])[len(context) :]
        return self._certain() + self.held

    def _certain(self) -> str:
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            told, self.held, self.stopped = self.held[: min(found)], "", True
            return told
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        told, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return told


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
