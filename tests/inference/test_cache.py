"""Cached, chunked and uncached paths compute the same; the cache holds what it says."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.segments import Segments
from megatron_zebra.inference.cache import BLOCK, Cache, Ring
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.planning.kv_cache import kv_cache_bytes
from tests.model.test_decoder import make

WINDOW = 7
KINDS = {
    "first global": ["global", "local", "local", "global", "local"],
    "first local": ["local", "local", "global", "local", "global"],
    "all full": ["global"] * 5,
    "all local": ["local"] * 5,
}
LENGTHS = (41, 3, WINDOW, WINDOW + 1, 26, 1)


def model(kinds: str, **more: Any) -> LanguageModel:
    return LanguageModel(*make(layer_kinds=KINDS[kinds], **more))


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator) for n in lengths]


def uncached(asked: LanguageModel, texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([asked.logits(text[None])[0, -1] for text in texts])


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, WINDOW, WINDOW + 1, 16, 1000])
def test_W10_I04_every_chunking_equals_no_cache(kinds: str, chunk: int) -> None:
    asked = model(kinds)
    cache = Cache(len(LENGTHS))
    logits = asked.prefill(cache, prompts(), chunk)
    torch.testing.assert_close(logits, uncached(asked, prompts()), rtol=0, atol=1e-5)
    assert cache.lengths == list(LENGTHS)
    # Then token by token, beyond the window again, some sequences of the batch only.
    texts, going = prompts(), [0, 2, 3, 5]
    for token in prompts((WINDOW + 5,), 1)[0]:
        logits = asked.decode(cache, token.repeat(len(going)), going)
        texts = [torch.cat([text, token[None]]) if i in going else text for i, text in enumerate(texts)]
        torch.testing.assert_close(logits, uncached(asked, [texts[i] for i in going]), rtol=0, atol=1e-5)


def test_I01_a_global_layer_still_sees_a_needle_four_windows_away() -> None:
    asked = model("first global")
    first, *_ = prompts((4 * WINDOW + 2,))
    other = first.clone()
    other[0] = (other[0] + 1) % 97
    logits = [asked.prefill(Cache(1), [text], 5) for text in (first, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    local = LanguageModel(*make(layer_kinds=["local"], num_layers=1))
    logits = [local.prefill(Cache(1), [text], 5) for text in (first, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 9, 300, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_bytes_are_the_planners_and_local_layers_do_not_grow(tokens: int) -> None:
    asked = model("first global")
    cache = Cache(1)
    asked.prefill(cache, prompts((tokens,)), 512)
    assert cache.bytes == kv_cache_bytes(asked.arch, tokens, 4)
    rings = [kept for kept in cache.layers[0].values() if isinstance(kept, Ring)]
    assert len(rings) == 3
    for ring in rings:
        assert ring.store is not None
        assert ring.store.shape[1] == WINDOW + 1


def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    return attention(q, k, v, Segments.from_lengths([len(q)], [len(k)]), window=window, backend="cpu")


@given(window=st.integers(1, 9), chunks=st.lists(st.integers(1, 25), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_ring_attends_as_if_it_had_kept_everything(window: int, chunks: list[int]) -> None:
    total, ring = sum(chunks), Ring(window)
    q, k, v = (torch.randn(total, heads, 4, dtype=torch.float64) for heads in (2, 1, 1))
    out = torch.cat([ring.attend(*parts, kernel) for parts in zip(q.split(chunks), k.split(chunks), v.split(chunks))])
    i, j = torch.arange(total)[:, None], torch.arange(total)[None, :]
    scores = torch.einsum("qhd,khd->hqk", q, k.expand(-1, 2, -1)) * 0.5
    share = scores.masked_fill((j > i) | (j < i - window), float("-inf")).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", share, v.expand(-1, 2, -1)), rtol=0, atol=1e-12)


def test_a_decoded_token_copies_no_ring() -> None:
    ring = Ring(100)
    ring.attend(*(torch.randn(150, 1, 4) for _ in range(3)), kernel)
    assert ring.store is not None
    before, kept = ring.store.data_ptr(), ring.store.clone()
    ring.attend(*(torch.randn(1, 1, 4) for _ in range(3)), kernel)
    assert ring.store.data_ptr() == before
    assert (ring.store != kept).any(-1).any(0).sum() == 1  # one slot
