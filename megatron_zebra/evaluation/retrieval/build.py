"""From a case and a text to the tokens of an example, exactly as many as asked for.

Head, text with what is planted in it, question and answers are tokenized each for itself, as they stand after other text,
and joined: so the length is exact, and the text of an indexed pair is taken as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.permutation import derive_key
from megatron_zebra.data.tokenizer import Tokenizer
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.answers import Example
from megatron_zebra.evaluation.retrieval.haystack import Haystack
from megatron_zebra.evaluation.retrieval.tasks import EVERYWHERE, TASKS, Case, Counts, Draw

HEAD = "Remember what is hidden in this text: it will be asked for at the end.\n\n"
_BEFORE = "a"  # what a text is tokenized after, so that its first word gets the space before it

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Frame:
    """What stands around the words of the prompt: ``before`` the first, and ``middle`` between the question and the
    beginning of the answer. ``encode`` knows the special tokens in them; the tokens ``prefix`` come before all."""

    encode: Encode
    before: str = ""
    middle: str = "\n"
    prefix: Sequence[int] = ()


def frame_of(tokenizer: Tokenizer, template: ChatTemplate | None, bos: bool) -> Frame:
    """Of a base model (``template`` None: plain text, ``bos``: after what the tokenizer's rules put before one), or of a
    chat model."""
    if template is None:
        return Frame(tokenizer.encode, prefix=tokenizer.prefix if bos else ())
    return Frame(template.tokens, *template.around())


def make_example(
    task: str,
    number: int,
    length: int,
    stratum: int,
    strata: int,
    *,
    haystack: Haystack,
    tokenizer: Tokenizer,
    frame: Frame,
    counts: Counts,
    seed: int,
) -> Example:
    """The ``number``-th example of a cell: a function of the arguments alone. Its last answer ends at ``length`` tokens.

    Raises:
        UserError: the length is too short for the task, or the text for the length.
    """
    generator = np.random.Generator(
        np.random.PCG64(derive_key("retrieval", seed, task, length, stratum, strata, number))
    )
    drawn = haystack.draw(generator, length)
    text = tokenizer.decode(drawn.tokens.tolist())
    case = TASKS[task](Draw(generator, text, stratum, strata, counts))
    return _join(task, case, length, strata, drawn, tokenizer.encode, frame)


def _join(task: str, case: Case, length: int, strata: int, drawn: Haystack, encode: Encode, frame: Frame) -> Example:
    head = [*frame.prefix, *frame.encode(frame.before + HEAD)]
    tail, *answers = divide(
        frame.encode, [f"\n\n{case.question}{frame.middle}{case.lead}", *(text for _, text in case.answers)]
    )
    planted = [(depth, divide(encode, [f" {text}"])[0]) for depth, text in case.planted]
    room = length - sum(map(len, [head, tail, *answers, *(ids for _, ids in planted)]))
    if room < 1:
        raise UserError(
            f"--lengths {length}: too short for the task {task}, which takes {length - room} tokens beside the text"
        )
    if room > drawn.tokens.size:
        raise UserError(
            f"--text: has {drawn.tokens.size} tokens, but --lengths {length} takes {room} of it; give more text, shorter "
            "--lengths, or --repeat"
        )
    tokens, done = list(head), 0
    for place, _, ids in sorted((drawn.place(depth, room, strata), depth, ids) for depth, ids in planted):
        tokens += [*drawn.tokens[done:place].tolist(), *ids]
        done = place
    tokens += [*drawn.tokens[done:room].tolist(), *tail]
    bounds = list(accumulate(map(len, answers), initial=len(tokens)))
    tokens += [token for ids in answers for token in ids]
    depths: list[float | None] = [depth for depth, _ in case.answers]
    return Example(np.array(tokens, np.int32), list(pairwise(bounds)), length, depths, [None] * len(answers))


def strata_of(task: str, strata: int) -> int:
    return 1 if task in EVERYWHERE else strata


def divide(encode: Encode, parts: Sequence[str]) -> list[list[int]]:
    """The ids of ``parts`` as one text that follows another, cut where each begins: at the first token in which the whole
    differs from the parts before alone."""
    texts = list(accumulate([_BEFORE, *parts]))
    whole = encode(texts[-1])
    shared = [_shared(encode(text), whole) for text in texts[:-1]]
    return [whole[start:stop] for start, stop in pairwise([*accumulate(shared, max), len(whole)])]


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids are the same from the first on."""
    return next((n for n, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))
