"""The share of attention beyond a window, against a dense softmax."""

import numpy as np
import pytest
import torch

from megatron_zebra.data.rows import Row
from megatron_zebra.evaluation import attention_mass
from megatron_zebra.evaluation.attention_mass import mass_beyond, most_distant, profile
from tests.model.test_decoder import make

WINDOWS = (1, 4, 9)


def dense(q: torch.Tensor, k: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Summed over queries, by head: every pair written out."""
    length, heads, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * dim**-0.5
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    share = scores.masked_fill(j > i, float("-inf")).softmax(-1)
    return share.masked_fill((j >= i - window) | (j < sinks), 0.0).sum((1, 2))


@pytest.mark.parametrize("sinks", [0, 3])
def test_mass_equals_a_dense_softmax(sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_mass, "SCORES_AT_ONCE", 4 * 30 * 7
    )  # seven queries at once: blocks that do not divide
    q, k = 2 * torch.randn(30, 4, 8), 2 * torch.randn(30, 2, 8)
    found = mass_beyond(q, k, WINDOWS, sinks)
    for number, window in enumerate(WINDOWS):
        torch.testing.assert_close(found[0, number], dense(q, k, window, 0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1, number], dense(q, k, window, sinks), rtol=1e-5, atol=1e-5)


def test_some_of_the_queries_stand_for_all() -> None:
    q, k = 2 * torch.randn(30, 4, 8), 2 * torch.randn(30, 2, 8)
    found = mass_beyond(q, k, WINDOWS, 2, every=7)
    one_by_one = [mass_beyond(q[: i + 1], k[: i + 1], WINDOWS, 2, every=max(i, 1)) for i in (7, 14, 21, 28)]
    torch.testing.assert_close(found, sum(one_by_one))  # the first token has nothing beyond a window


def test_documents_of_a_row_are_measured_apart() -> None:
    _, model = make(layer_group_size=1)
    lengths, ids = [24, 5, 31], np.random.default_rng(0).integers(0, 97, 60)
    positions = np.concatenate([np.arange(n) for n in lengths])
    packed = Row(ids, np.full(60, -100), positions, np.array(lengths))
    alone = [
        Row(part, np.full(len(part), -100), np.arange(len(part)), np.array([len(part)]))
        for part in np.split(ids, np.cumsum(lengths)[:-1])
    ]
    both, apart = profile(model, [packed], WINDOWS), profile(model, alone, WINDOWS)
    assert both.queries == apart.queries == [22 + 3 + 29, 19 + 26, 14 + 21]
    torch.testing.assert_close(both.mass, apart.mass, rtol=1e-4, atol=1e-6)
    assert (both.mass_without_sinks <= both.mass + 1e-6).all()
    assert (both.mass[0] >= both.mass[1]).all()


def test_text_within_the_window_is_refused() -> None:
    _, model = make(layer_group_size=1)
    row = Row(np.zeros(9, np.int64), np.full(9, -100), np.arange(9), np.array([9]))
    with pytest.raises(ValueError, match="no document reaches beyond the window 9"):
        profile(model, [row], WINDOWS)


def test_the_layers_that_look_furthest_stay_global() -> None:
    mass = torch.zeros(1, 6, 2, dtype=torch.float64)
    mass[0, [4, 1]] = torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64)
    assert most_distant(attention_mass.Profile((7,), 4, mass, mass, [1]), 7, 2) == [1, 4]
