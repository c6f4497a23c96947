"""The loss with a teacher against torch's divergence on full logits."""

import pytest
import torch
import torch.nn.functional as F

from megatron_zebra.model.distill import Guide
from megatron_zebra.model.loss import IGNORE, token_loss
from tests.model.test_loss import case

TOKENS, VOCAB = 41, 53


def teacher(share: float, temperature: float, dtype: torch.dtype = torch.float64) -> Guide:
    """Of another width than the model."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(TOKENS, 10, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, 10, generator=generator, dtype=torch.float64).to(dtype)
    return Guide(hidden, weight, share, temperature)


def dense(
    own: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, share: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixture, cross entropy and divergence by token, of full logits."""
    entropy = F.cross_entropy(own, labels, reduction="none", ignore_index=IGNORE)
    scaled = [F.log_softmax(logits / temperature, -1) for logits in (own, theirs)]
    apart = F.kl_div(*scaled, reduction="none", log_target=True).sum(-1) * temperature**2
    apart = apart.masked_fill(labels == IGNORE, 0.0)
    return ((1 - share) * entropy + share * apart).sum(), entropy, apart


@pytest.mark.parametrize(("share", "temperature"), [(0.3, 1.0), (0.7, 2.5), (1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("chunk_size", [7, 100])
def test_equals_full_logits(chunk_size: int, share: float, temperature: float) -> None:
    hidden, weight, labels = case(TOKENS, torch.float64, VOCAB)
    guide = teacher(share, temperature)
    total, each, apart = token_loss(hidden, weight, labels, chunk_size, guide=guide)
    (total * 0.3).backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    wanted = dense(
        F.linear(hidden, weight), F.linear(guide.hidden, guide.weight), labels, guide.share, guide.temperature
    )
    (wanted[0] * 0.3).backward()
    for ours, theirs in zip((total, each, apart, *got), (*wanted, hidden.grad, weight.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-11)


def test_the_gradient_is_that_of_differences() -> None:
    hidden, weight, labels = case(5, torch.float64, 6)
    guide = teacher(0.6, 1.7)
    guide = Guide(guide.hidden[:5], guide.weight[:6], guide.share, guide.temperature)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return token_loss(hidden, weight, labels, 2, split_backward=True, guide=guide)[0]  # backward runs several times

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_without_gradients_nobody_is_asked() -> None:
    hidden, weight, labels = case(TOKENS, torch.float64, VOCAB)
    with torch.no_grad():
        total, each, apart = token_loss(hidden, weight, labels, 7, guide=teacher(0.5, 1.0))
    assert apart is None
    torch.testing.assert_close(total, each.sum())


def test_a_teacher_that_agrees_pulls_nowhere() -> None:
    hidden, weight, labels = case(TOKENS, torch.float64, VOCAB)
    guide = Guide(hidden.detach().clone(), weight.detach().clone(), 1.0, 2.0)
    total, _, apart = token_loss(hidden, weight, labels, 7, guide=guide)
    total.backward()
    assert apart is not None
    assert apart.abs().max() < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12


def test_peak_is_a_few_chunks_of_logits() -> None:
    tokens, vocab, chunk = 4096, 8192, 128
    hidden, weight, labels = case(tokens, torch.float32, vocab)
    guide = Guide(hidden.detach().clone(), weight.detach().clone(), 0.5, 2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_loss(hidden, weight, labels, chunk, guide=guide)[0].backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < 2 * 4 * (hidden.numel() + weight.numel()) + 7 * 4 * chunk * vocab
    assert peak < 4 * tokens * vocab / 3
