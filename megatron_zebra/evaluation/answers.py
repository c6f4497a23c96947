"""Exact match of answers by length and depth, in one forward an example and without generation.

Greedy decoding gives the right answer if and only if, with the right answer as input, the most likely token at each of its
positions is the right one: up to the first difference both see the same tokens. So only the hidden states at the answers'
positions go through the head. Every answer is judged with the right ones before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from megatron_zebra.data.chat import conversations
from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks
from megatron_zebra.errors import UserError
from megatron_zebra.inference.packed import packed_states
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import sum_over

_AT_ONCE = 1024  # positions whose logits exist at once
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A conversation: ``tokens`` int32 [n], and of each of its answers where it lies in them, its depth and its kind."""

    tokens: npt.NDArray[np.int32]
    turns: list[tuple[int, int]]
    length: int
    depths: list[float | None]
    kinds: list[str | None]


@dataclass(frozen=True)
class Answered:
    """Of every answer of a data set, in order: float64 [answers]. ``exact`` 1 or 0, ``loss`` the sum over its ``tokens``."""

    exact: Floats
    loss: Floats
    tokens: Floats


def read_examples(path: Path, template: ChatTemplate, vocab_size: int) -> list[Example]:
    """The conversations of a JSON-lines file, with what tools/build_long_qa.py says of them ("meta"), where it does.

    A conversation without a given length counts under the next power of two.

    Raises:
        UserError: a line is bad, or has ids that the model does not have.
    """
    options = InputOptions(format="jsonl")
    chunks = (chunk for file in find_files([path], options) for chunk in read_chunks(file, options))
    examples = []
    for where, messages, meta in (found for chunk in chunks for found in conversations(chunk)):
        rendered = template.encode(messages, where)
        if rendered.tokens.max() >= vocab_size:
            raise UserError(
                f"{where}: token {rendered.tokens.max()}, but the model has the ids 0 to {vocab_size - 1}; is --tokenizer the model's?"
            )
        questions: Any = meta.get("questions")
        told = (
            questions
            if isinstance(questions, list) and len(questions) == len(rendered.turns)
            else [{}] * len(rendered.turns)
        )
        length = meta.get("length")
        if type(length) is not int:
            length = 1 << (rendered.tokens.size - 1).bit_length()
        depths = [_depth(question) for question in told]
        kinds = [question.get("kind") if isinstance(question, dict) else None for question in told]
        examples.append(Example(rendered.tokens, rendered.turns, length, depths, kinds))
    if not examples:
        raise UserError(f"{path}: holds no conversation")
    return examples


@torch.no_grad()
def judge(
    model: Decoder,
    examples: Sequence[Example],
    device: torch.device,
    part: slice = slice(None),
    progress: Callable[[], object] = lambda: None,
) -> Answered:
    """Run ``model`` over ``examples[part]``; the answers of the others are 0 in all columns."""
    first = np.cumsum([0, *(len(example.turns) for example in examples)])
    columns = np.zeros((3, int(first[-1])))
    for number in range(len(examples))[part]:
        example = examples[number]
        stop = example.turns[-1][1]
        tokens = torch.from_numpy(example.tokens[:stop].astype(np.int64)).to(device)
        at = torch.cat([torch.arange(start, end, device=device) for start, end in example.turns])
        sizes = [end - start for start, end in example.turns]
        right, losses = zip(*_compare(model, tokens, at))
        for place, (good, loss) in enumerate(zip(torch.cat(right).split(sizes), torch.cat(losses).split(sizes))):
            columns[:, first[number] + place] = float(good.all()), float(loss.double().sum()), sizes[place]
        progress()
    return Answered(*columns)


def judge_together(
    model: Decoder, examples: Sequence[Example], grid: Grid, progress: Callable[[], object] = lambda: None
) -> Answered:
    """``judge`` by all ranks, which share the examples out; the same on all. Each rank has the whole stack of layers."""
    found = judge(model, examples, grid.device, slice(grid.data.rank, None, grid.data.size), progress)
    first = grid.tp.rank == 0  # the others have the same
    columns = [sum_over((column * first).tolist(), grid.device) for column in (found.exact, found.loss, found.tokens)]
    return Answered(*map(np.array, columns))


def _compare(model: Decoder, tokens: torch.Tensor, at: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the tokens at ``at``, some at a time: whether each is the most likely one, and its loss."""
    assert model.head is not None
    states = packed_states(model, [tokens[:-1]])
    for place in at.split(_AT_ONCE):
        logits, wanted = model.head.logits(states[place - 1]).float(), tokens[place]
        yield logits.argmax(-1) == wanted, F.cross_entropy(logits, wanted, reduction="none")


def tables(examples: Sequence[Example], answered: Answered, bins: int) -> dict[str, Any]:
    """Shares of exact answers, in all, by length, by kind, and by length and depth ([lengths][bins], None where nothing
    was asked). Bin b holds the depths from b / bins up to (b + 1) / bins."""
    lengths = np.repeat([example.length for example in examples], [len(example.turns) for example in examples])
    depths = np.array([np.nan if depth is None else depth for example in examples for depth in example.depths])
    kinds = np.array([kind or "" for example in examples for kind in example.kinds])
    known = sorted(set(lengths.tolist()))
    bin_of = np.where(np.isnan(depths), -1, np.minimum(np.nan_to_num(depths) * bins, bins - 1).astype(int))

    def share(chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
        return {
            "exact": float(answered.exact[chosen].mean()) if chosen.any() else None,
            "asked": int(chosen.sum()),
            "loss": float(answered.loss[chosen].sum() / answered.tokens[chosen].sum()) if chosen.any() else None,
        }

    cells = [[share((lengths == length) & (bin_of == b)) for b in range(bins)] for length in known]
    return {
        "all": share(np.ones(lengths.size, bool)),
        "by_length": {str(length): share(lengths == length) for length in known},
        "by_kind": {str(kind): share(kinds == kind) for kind in sorted(set(kinds.tolist()) - {""})},
        "lengths": known,
        "depth_edges": [b / bins for b in range(bins + 1)],
        "exact": [[cell["exact"] for cell in row] for row in cells],
        "asked": [[cell["asked"] for cell in row] for row in cells],
    }


def _depth(question: Any) -> float | None:
    depth = question.get("depth") if isinstance(question, dict) else None
    good = isinstance(depth, int | float) and not isinstance(depth, bool) and 0 <= depth <= 1
    return float(depth) if good and depth is not None else None
