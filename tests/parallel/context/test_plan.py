"""The plan against the mask, key by key."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.parallel.context.layout import local_index
from megatron_zebra.parallel.context.plan import Plan, make_plan, tokens_received, tokens_sent
from tests.parallel.context.cases import boundaries, ragged


def mask(cu: np.ndarray, window: int | None) -> np.ndarray:
    """[N, N] bool, True where the query (first) sees the key, by the definition."""
    position, document = np.arange(cu[-1]), np.searchsorted(cu, np.arange(cu[-1]), side="right")
    distance = position[:, None] - position[None]
    seen = (document[:, None] == document[None]) & (distance >= 0)
    return seen if window is None else seen & (distance <= window)


def carried_out(plans: list[Plan], own: list[np.ndarray]) -> list[np.ndarray]:
    """What each rank receives: positions of the tokens, in the order of arrival."""
    parcels = [np.split(own[p.rank][p.send], np.cumsum(p.send_counts)[:-1]) for p in plans]
    return [np.concatenate([parcels[source][p.rank] for source in range(len(plans))]) for p in plans]


@st.composite
def cases(draw: st.DrawFn):
    order = draw(st.sampled_from(["zigzag", "contiguous"]))
    cp, rows = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 7)) * cp * (2 if order == "zigzag" else 1)
    cuts = draw(st.lists(st.integers(0, rows * length), max_size=20))  # twice the same: an empty document
    cu = np.sort(np.concatenate([np.arange(rows + 1) * length, cuts]).astype(np.int64))
    window = draw(st.none() | st.integers(1, length + 5))
    return cu, rows, length, cp, order, window


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_visible_key_arrives_once_and_nothing_else_does_P03_P08_K03(case) -> None:
    cu, rows, length, cp, order, window = case
    seen = mask(cu, window)
    plans = [make_plan(cu, rows, length, cp, rank, order, window) for rank in range(cp)]
    own = [local_index(rank, cp, rows, length, order) for rank in range(cp)]
    for plan, mine, received in zip(plans, own, carried_out(plans, own)):
        needed = np.flatnonzero(seen[mine].any(axis=0))
        assert sorted(received.tolist()) == np.setdiff1d(needed, mine).tolist()
        assert plan.received == len(received)
        check_segments(plan, mine, np.concatenate([mine, received])[plan.pick], seen, cu)
        check_uses(plan)
        assert np.array_equal(plan.sent, tokens_sent(cu, rows, length, cp, order, window))
        assert np.all(np.diagonal(plan.sent) == 0)


def check_segments(plan: Plan, own: np.ndarray, keys: np.ndarray, seen: np.ndarray, cu: np.ndarray) -> None:
    """Each segment is queries in order, and consecutive keys of one document: all that any of the queries sees."""
    assert plan.cu_q[0] == plan.cu_k[0] == 0
    assert (plan.cu_q[-1], plan.cu_k[-1]) == (len(own), len(keys))
    for a, b, c, d in zip(plan.cu_q, plan.cu_q[1:], plan.cu_k, plan.cu_k[1:]):
        queries, segment = own[a:b], keys[c:d]
        assert 0 < len(queries) <= len(segment)
        assert np.array_equal(queries, segment[len(segment) - len(queries) :])
        assert np.array_equal(segment, np.flatnonzero(seen[queries].any(axis=0)))
        assert np.searchsorted(cu, segment[0], side="right") == np.searchsorted(cu, segment[-1], side="right")


def check_uses(plan: Plan) -> None:
    """Every own and received token is used, once or twice, and the uses are all of the keys."""
    tokens = plan.tokens + plan.received
    assert np.array_equal(plan.pick[plan.first_use], np.arange(tokens))
    assert np.array_equal(plan.pick[plan.second_use], plan.reused)
    assert len(np.unique(plan.reused)) == len(plan.reused)
    assert sorted([*plan.first_use, *plan.second_use]) == list(range(len(plan.pick)))


def test_a_rank_knows_where_its_part_of_a_document_lies_K02() -> None:
    plan = make_plan([0, 2048], 1, 2048, 2, 1, "contiguous", None)
    assert plan.cu_q.tolist() == [0, 1024]
    assert plan.cu_k.tolist() == [0, 2048]
    local = make_plan([0, 2048], 1, 2048, 2, 1, "contiguous", 100)
    assert (local.cu_q.tolist(), local.cu_k.tolist()) == ([0, 1024], [0, 1124])


def test_odd_documents_keep_their_bounds_K03() -> None:
    cu = boundaries([5, 3, 9, 1])
    plans = [make_plan(cu, 1, 18, 2, rank, "contiguous", None) for rank in range(2)]
    assert [p.cu_q.tolist() for p in plans] == [[0, 5, 8, 9], [0, 8, 9]]
    assert [p.cu_k.tolist() for p in plans] == [[0, 5, 8, 9], [0, 9, 10]]
    assert plans[0].sent.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_short_documents_send_nothing(order) -> None:
    cu = boundaries([4] * 24)
    for window in (1, 3, 100, None):
        assert tokens_sent(cu, 2, 48, 3, order, window).sum() == 0
        assert make_plan(cu, 2, 48, 3, 1, order, window).keys_are_own


def test_ranks_of_a_local_layer_hear_only_from_those_within_its_window_P03_P09() -> None:
    """4 ranks of 8 tokens: from how many others a rank receives, by window."""
    hops = {
        window: (tokens_sent([0, 32], 1, 32, 4, "contiguous", window) > 0).sum(axis=0).tolist()
        for window in (3, 8, 11, 20, 40)
    }
    assert hops == {3: [0, 1, 1, 1], 8: [0, 1, 1, 1], 11: [0, 1, 2, 2], 20: [0, 1, 2, 3], 40: [0, 1, 2, 3]}


@pytest.mark.parametrize(("order", "chunks"), [("contiguous", 1), ("zigzag", 2)])
@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_what_a_local_layer_receives_does_not_grow_with_the_sequence_P08(cp: int, order, chunks: int) -> None:
    window, seen = 64, set()
    for length in (1024 * cp, 2048 * cp, 8192 * cp, 131072 * cp):
        sent = tokens_sent([0, length], 1, length, cp, order, window)
        assert sent.sum(axis=0).max() <= chunks * window
        assert sent.sum(axis=1).max() <= chunks * window
        seen.add(tuple(tokens_received(sent).tolist()))
    assert len(seen) == 1
    sent = tokens_sent([0, 8192 * cp], 1, 8192 * cp, cp, order, None)
    assert sent.sum() == tokens_sent([0, 4096 * cp], 1, 4096 * cp, cp, order, None).sum() * 2


def test_a_token_wanted_by_both_chunks_of_a_rank_is_sent_once() -> None:
    plan = make_plan([0, 16], 1, 16, 2, 0, "zigzag", None)  # chunks 0 and 3; 3 wants 0, 1 and 2
    assert (plan.received, len(plan.pick), plan.reused.tolist()) == (8, 4 + 16, [0, 1, 2, 3])
    plan = make_plan([0, 24], 1, 24, 3, 1, "zigzag", None)  # chunks 1 and 4 both want chunk 0
    assert plan.receive_counts == [4, 0, 8]


def test_bytes_there_and_back() -> None:
    sent = np.array([[0, 3], [1, 0]])
    assert tokens_received(sent).tolist() == [1 + 3, 3 + 1]
    assert tokens_received(sent, fetches=2).tolist() == [2 + 3, 6 + 1]
    assert tokens_received(sent, gradients=False).tolist() == [1, 3]


@pytest.mark.parametrize("cu", [[0, 8], [0, 16], [1, 8, 16], [0, 8, 6, 16], [0, 7, 16], [0, 8, 17]])
def test_boundaries_that_do_not_fit_are_refused(cu: list[int]) -> None:
    with pytest.raises(ValueError, match="2 rows of 8 tokens"):
        make_plan(cu, 2, 8, 2, 0, "zigzag", 3)


def test_windows_that_are_no_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_plan([0, 8], 1, 8, 2, 0, "zigzag", 0)


@pytest.mark.parametrize("window", [512, None])
def test_a_plan_of_thousands_of_documents_takes_milliseconds(window: int | None) -> None:
    length = 131072
    cu = ragged(1, length, 4000, seed=0)
    began = time.perf_counter()
    make_plan(cu, 1, length, 16, 3, "zigzag", window)
    assert time.perf_counter() - began < 0.5  # 10 ms where nothing else runs
