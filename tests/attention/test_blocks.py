"""What the CPU kernel computes is O(S · w): counted, not timed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.attention import cpu
from megatron_zebra.attention.blocks import SHORT, Plan, plan
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import Window, allowed_pairs
from tests.attention.cases import inputs


def cut(q_lengths: list[int], k_lengths: list[int] | None = None, window: Window = None, group: int = 4) -> Plan:
    segments = Segments.from_lengths(q_lengths, k_lengths)
    return plan(segments.cu_q, segments.cu_k, window, group)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [64, 128, 512, 2048])
def test_one_document_costs_little_more_than_its_mask(window: int, group: int) -> None:
    for size in (16384, 16384 + 77, 65536):
        assert cut([size], None, window, group).pairs <= 1.51 * allowed_pairs([size], None, window)
    if group >= 4 and window >= 512:
        assert cut([65536], None, window, group).pairs <= 1.07 * allowed_pairs([65536], None, window)


def test_cost_grows_with_the_length_and_calls_do_not() -> None:
    small, large = cut([16384], None, 512), cut([65536], None, 512)
    assert large.pairs < 4.1 * small.pairs
    assert small.calls == large.calls <= 3


def test_a_chunk_with_its_halo_costs_what_its_queries_see() -> None:
    assert cut([4096], [4096 + 512], 512).pairs <= 1.07 * allowed_pairs([4096], [4096 + 512], 512)
    # Keys beyond the window are not read at all.
    assert cut([4096], [16384], 512).pairs == cut([4096], [4096 + 512], 512).pairs


def test_full_attention_computes_the_mask_and_no_more() -> None:
    assert cut([4000]).pairs == allowed_pairs([4000])
    assert cut([1000], [4000]).pairs == allowed_pairs([1000], [4000])
    assert cut([4000]).whole
    assert not cut([4000, 0], [4000, 5]).whole


def test_many_short_documents_take_few_calls() -> None:
    lengths = np.random.default_rng(0).integers(1, SHORT + 1, 500).tolist()
    for window in (None, 8, 512):
        assert cut(lengths, None, window).calls <= 8
    assert cut(lengths).pairs <= 1.5 * allowed_pairs(lengths)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 700), max_size=6),
    st.lists(st.integers(0, 700), max_size=6),
    st.one_of(st.none(), st.integers(1, 300)),
    st.sampled_from([1, 4]),
)
def test_every_query_is_written_once_and_cost_is_bounded(
    q_lengths: list[int], halos: list[int], window: int | None, group: int
) -> None:
    halos = (halos + [0] * len(q_lengths))[: len(q_lengths)]
    k_lengths = [q + h for q, h in zip(q_lengths, halos)]
    calls = cut(q_lengths, k_lengths, window, group)
    written = np.zeros(sum(q_lengths), dtype=int)
    for tiles in calls.tiles:
        if not tiles.merge:
            written[tiles.q_start : tiles.q_start + tiles.rows * tiles.count] += 1
    for padded in calls.padded:
        np.add.at(written, padded.q_source, 1)
    assert (written == 1).all()
    if window is not None:
        # A tile has at most max(32, w / 4) queries; a segment that is not cut at all at most SHORT or w + 1 keys.
        assert calls.pairs <= sum(q_lengths) * (window + max(32, window // 4, SHORT) + 1)


@pytest.mark.parametrize("lengths", [[3000], [1500, 700, 30, 20, 9, 64, 65]])
@pytest.mark.parametrize("window", [100, None])
def test_the_kernel_is_given_what_the_plan_counts(
    lengths: list[int], window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions; and no mask is larger than one tile."""
    counted: dict[str, int] = {"_forward": 0, "_backward": 0}

    def counting(name: str) -> Any:
        kernel, at = getattr(cpu, name), {"_forward": 0, "_backward": 1}[name]

        def call(*args: Any, attn_mask: torch.Tensor | None = None, **options: Any) -> Any:
            q, k = args[at], args[at + 1]
            causal = args[at + 4] if name == "_forward" else args[7]
            rows, keys = q.shape[2], k.shape[2]
            assert not causal or rows == keys
            assert attn_mask is None or attn_mask.numel() <= 64 * 200
            counted[name] += q.shape[0] * (rows * (rows + 1) // 2 if causal else rows * keys)
            return kernel(*args, attn_mask=attn_mask, **options)

        return call

    for name in counted:
        monkeypatch.setattr(cpu, name, counting(name))
    case = inputs(lengths, None, (1, 1), head_dim=2, dtype=torch.float32)
    out = cpu.attention(case.q, case.k, case.v, case.segments, window=window, scale=1.0)
    out.sum().backward()
    assert counted == dict.fromkeys(counted, cut(lengths, None, window, 1).pairs)
