"""Judge a model by retrieval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.tokenizer import Tokenizer
from megatron_zebra.evaluation.answers import Example, judge_together, tables
from megatron_zebra.evaluation.retrieval.build import frame_of, make_example, strata_of
from megatron_zebra.evaluation.retrieval.haystack import open_haystack
from megatron_zebra.evaluation.retrieval.tasks import TASKS, Counts
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.grid import Grid


@dataclass(frozen=True)
class Retrieval:
    """What to ask: ``examples`` of every task, length (tokens, answer included) and stratum of depth.

    ``text`` are files, folders or prefixes of indexed pairs; ``repeat``: one that is too short begins anew at its end.
    """

    text: Sequence[str]
    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] = (1024, 2048, 4096)
    depths: int = 10
    examples: int = 10
    seed: int = 0
    repeat: bool = False
    counts: Counts = field(default_factory=Counts)
    bos: bool = True


Make = Callable[[str, int, int, int, int], Example]  # of task, number, length, stratum, strata


def example_maker(settings: Retrieval, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> Make:
    """What makes the examples; every task and length has been tried, so that what does not fit is told before any work.
    With a ``template`` the model is asked in chat, else its prompt is plain text that the answer goes on from.

    Raises:
        UserError: the text is not readable or too short, or a length too short for a task.
    """
    haystack = open_haystack(settings.text, tokenizer, max(settings.lengths), settings.repeat)
    frame = frame_of(tokenizer, template, settings.bos)
    make = partial(
        make_example, haystack=haystack, tokenizer=tokenizer, frame=frame, counts=settings.counts, seed=settings.seed
    )
    for task in settings.tasks:
        for length in settings.lengths:
            make(task, 0, length, 0, 1)
    return make


def retrieve(
    model: Decoder,
    settings: Retrieval,
    make: Make,
    grid: Grid,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Of each task the shares of exact answers (``evaluation.answers.tables``), the same on all ranks, which share out the
    examples of ``example_maker``.

    ``model`` has all layers on every rank. ``progress`` is told of each example that this rank has done.
    """
    found = {}
    for task in settings.tasks:
        strata = strata_of(task, settings.depths)
        cells = [(length, stratum) for length in settings.lengths for stratum in range(strata)]
        examples = [make(task, n, *cell, strata) for cell in cells for n in range(settings.examples)]
        found[task] = tables(examples, judge_together(model, examples, grid, progress), strata)
    return found


def examples_of(settings: Retrieval) -> int:
    """How many examples all ranks judge together."""
    strata = sum(strata_of(task, settings.depths) for task in settings.tasks)
    return strata * len(settings.lengths) * settings.examples
