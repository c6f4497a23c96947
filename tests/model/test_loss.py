"""The chunked loss against torch's on full logits, and its memory."""

import pytest
import torch
import torch.nn.functional as F

from megatron_zebra.model.loss import IGNORE, token_loss


def case(tokens: int, dtype: torch.dtype, vocab: int = 53) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 100])
@pytest.mark.parametrize("tokens", [1, 40, 41])
def test_equals_full_logits(tokens: int, chunk_size: int) -> None:
    hidden, weight, labels = case(tokens, torch.float64)
    total, each, _ = token_loss(hidden, weight, labels, chunk_size)
    (total * 0.3).backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    want = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none", ignore_index=IGNORE)
    (want.sum() * 0.3).backward()
    torch.testing.assert_close(total, want.sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(each, want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got[0], hidden.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], weight.grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        again, each_again, _ = token_loss(hidden, weight, labels, chunk_size)
    torch.testing.assert_close(again, want.sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each_again, each, rtol=0, atol=1e-12)


def test_all_ignored_gives_zero_and_no_gradient() -> None:
    hidden, weight, labels = case(9, torch.float32)
    total, *_ = token_loss(hidden, weight, torch.full_like(labels, IGNORE), 4)
    total.backward()
    assert total == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


def test_bf16_is_near_fp64() -> None:
    exact_hidden, exact_weight, labels = case(40, torch.float64)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (exact_hidden, exact_weight))
    rounded = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    token_loss(hidden, weight, labels, 16)[0].backward()
    token_loss(rounded[0], rounded[1], labels, 16)[0].backward()
    for got, want in ((hidden, rounded[0]), (weight, rounded[1])):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad.double() - want.grad).norm() < 0.01 * want.grad.norm()


def test_L08_peak_is_a_chunk_of_logits() -> None:
    """Bytes of the tensors alive at once: chunk x V (three of them), never T x V."""
    tokens, vocab, chunk = 4096, 8192, 256
    hidden, weight, labels = case(tokens, torch.float32, vocab)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_loss(hidden, weight, labels, chunk)[0].backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    kept = 2 * 4 * (hidden.numel() + weight.numel())
    assert peak < kept + 4 * 4 * chunk * vocab
    assert peak < 4 * tokens * vocab / 2
