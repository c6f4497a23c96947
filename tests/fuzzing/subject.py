"""What is fuzzed: a reader, and how its input is made."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["same", "other"]
"""How an input was taken: it means what it meant before, or something else that is sound. Refusals are UserErrors."""
Trial = Callable[[random.Random], Outcome]


@dataclass(frozen=True)
class Subject:
    """A kind of input.

    ``prepare`` makes the sound files in an empty folder and returns the trial: damage them, read them, compare what was
    read (an AssertionError if it is wrong). ``named`` is a pattern that a refusal's line must have, beside which the folder
    of the files will do.
    """

    prepare: Callable[[Path], Trial]
    named: str | None = None

    def unclear(self, message: str, folder: Path) -> str | None:
        """What is wrong with a refusal's message, if anything: it is to be lines of which each names a file or a key."""
        for line in message.split("\nerror: "):
            if len(line) > 1200:
                return f"{len(line)} characters"
            if not line.isprintable():
                return f"not one printable line: {line[:200]!r}"
            if str(folder) not in line and not (self.named and re.search(self.named, line)):
                return f"names no file and no key: {line[:200]}"
        return None
