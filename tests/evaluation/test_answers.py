"""Exact match without generation is that of greedy decoding, and the tables are counts of it."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.attention.contract import Segments
from megatron_zebra.evaluation import answers
from megatron_zebra.evaluation.answers import Answered, Example, judge, judge_together, tables
from megatron_zebra.model.architecture import resolve
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.training.build import build_model
from tests.data.corpus import patient
from tests.training.cases import small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = small()
    return build_model(config, resolve(config.model, 101, 48), CPU).eval()


@torch.no_grad()
def logits(model: Decoder, tokens: list[int]) -> torch.Tensor:
    made = model(torch.tensor(tokens), torch.arange(len(tokens)), Segments.from_lengths([len(tokens)]))
    assert isinstance(made, torch.Tensor)
    return made


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Decoding by computing everything anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def conversation(model: Decoder, seed: int) -> tuple[Example, list[bool]]:
    """Two turns; each answer is what the model says, or that with one token changed; and whether decoding gives it."""
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    turns, right = [], []
    for turn in range(2):
        tokens += generator.integers(0, 101, generator.integers(3, 12)).tolist()
        answer = greedy(model, tokens, int(generator.integers(1, 6)))
        if (seed + turn) % 2:
            wrong = int(generator.integers(len(answer)))
            answer[wrong] = (answer[wrong] + 1) % 101
        right.append(greedy(model, tokens, len(answer)) == answer)
        turns.append((len(tokens), len(tokens) + len(answer)))
        tokens += answer
    return Example(np.array([*tokens, 5], np.int32), turns, 32, [0.1, None], ["code", None]), right


@pytest.mark.parametrize("at_once", [3, 1024])
def test_exact_match_is_that_of_greedy_decoding(model: Decoder, monkeypatch: Any, at_once: int) -> None:
    monkeypatch.setattr(answers, "_AT_ONCE", at_once)
    made = [conversation(model, seed) for seed in range(8)]
    examples = [example for example, _ in made]
    wanted = [good for _, right in made for good in right]
    assert 4 < sum(wanted) < 12
    found = judge(model, examples, CPU)
    assert found.exact.tolist() == [float(good) for good in wanted]
    place = 0
    for example in examples:
        scores = logits(model, example.tokens.tolist())
        for start, stop in example.turns:
            loss = F.cross_entropy(
                scores[start - 1 : stop - 1], torch.tensor(example.tokens[start:stop]).long(), reduction="sum"
            )
            assert found.loss[place] == pytest.approx(float(loss), abs=1e-4)
            assert found.tokens[place] == stop - start
            place += 1
    halves = [judge(model, examples, CPU, slice(rank, None, 2)) for rank in range(2)]
    assert (halves[0].exact + halves[1].exact).tolist() == found.exact.tolist()
    assert np.allclose(halves[0].loss + halves[1].loss, found.loss)


def test_only_the_answers_go_through_the_head(model: Decoder, monkeypatch: Any) -> None:
    rows: list[int] = []
    real = F.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, weight, bias=None: (rows.append(len(x)) if len(weight) == 101 else None, real(x, weight, bias))[1],
    )
    tokens = np.arange(90, dtype=np.int32)
    judge(model, [Example(tokens, [(40, 43), (80, 84)], 128, [None] * 2, [None] * 2)], CPU)
    assert sum(rows) == 7
    assert not model.head._forward_pre_hooks  # type: ignore[union-attr]


cells = st.tuples(st.sampled_from([64, 128]), st.one_of(st.none(), st.floats(0, 1)), st.booleans())


def together(grid: Grid, examples: list[Example]) -> Answered:
    config = small()
    return judge_together(build_model(config, resolve(config.model, 101, 48), CPU, grid.tp).eval(), examples, grid)


@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"cp": 2}], ids=str)
def test_ranks_judge_each_example_once(run_distributed: Any, model: Decoder, axes: dict[str, int]) -> None:
    """Three examples: no number of ranks here divides them."""
    examples = [conversation(model, seed)[0] for seed in range(3)]
    wanted = judge(model, examples, CPU)
    assert 0 < wanted.exact.sum() < 6
    for found in run_distributed(together, 2, examples, **axes):
        assert found.exact.tolist() == wanted.exact.tolist()
        assert found.tokens.tolist() == wanted.tokens.tolist()
        assert found.loss == pytest.approx(wanted.loss, abs=1e-4)


@patient
@given(st.lists(cells, min_size=1, max_size=40), st.integers(1, 12))
def test_tables_count_every_answer_once(given_: list[tuple[int, float | None, bool]], bins: int) -> None:
    examples = [Example(np.zeros(4, np.int32), [(1, 3)], length, [depth], ["k"]) for length, depth, _ in given_]
    exact = np.array([float(good) for _, _, good in given_])
    result = tables(examples, Answered(exact, np.ones(len(exact)), np.full(len(exact), 2.0)), bins)
    assert result["all"] == {"exact": exact.mean(), "asked": len(given_), "loss": 0.5}
    assert result["by_kind"]["k"] == result["all"]
    assert sum(values["asked"] for values in result["by_length"].values()) == len(given_)
    for length, row, counts in zip(result["lengths"], result["exact"], result["asked"]):
        for b in range(bins):
            inside = [
                good
                for n, depth, good in given_
                if n == length and depth is not None and min(int(depth * bins), bins - 1) == b
            ]
            assert counts[b] == len(inside)
            assert row[b] == (pytest.approx(np.mean(inside)) if inside else None)
