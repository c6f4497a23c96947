"""From logits to the next token. Pure but for the generator."""

from dataclasses import dataclass

import torch

_MOST = 1e30  # of a penalised score: no infinity, whatever the penalty


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; the limits apply in this order, each None or off at its default.

    ``repetition_penalty``: scores of tokens already seen are divided by it if positive, else multiplied (CTRL, arXiv
    1909.05858). ``top_k``: only the k best. ``top_p``: the fewest best that together have this probability. ``min_p``: those
    with at least this share of the best one's probability (arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def problem(self) -> str | None:
        """What is wrong with these values, in one line: name, value, what is allowed."""
        if not 0 <= self.temperature < float("inf"):
            return f"temperature {self.temperature}: must be 0 (greedy) or more"
        if self.top_k is not None and self.top_k < 1:
            return f"top_k {self.top_k}: must be 1 or more"
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                return f"{name} {value}: must be above 0 and at most 1"
        if not 0 < self.repetition_penalty < float("inf"):
            return f"repetition_penalty {self.repetition_penalty}: must be above 0"
        return None


def next_tokens(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token a sequence, [B] int64.

    Args:
        logits: [B, V].
        seen: [B, V] bool, the tokens that ``repetition_penalty`` is for.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen, penalised.clamp(-_MOST, _MOST), scores)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    return torch.multinomial(probabilities(scores, sampling), 1, generator=generator)[:, 0]


def probabilities(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[B, V], summing to 1, of what the limits leave."""
    scores = (
        scores - scores.amax(-1, keepdim=True)
    ) / sampling.temperature  # the best is 0, however low the temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p is not None:
        ranked, order = scores.softmax(-1).sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # probability of the better ones: the best always stays
        cut = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        scores = scores.masked_fill(cut, float("-inf"))
    chances = scores.softmax(-1)
    if sampling.min_p is not None:
        chances = chances.masked_fill(chances < sampling.min_p * chances.amax(-1, keepdim=True), 0.0)
    return chances / chances.sum(-1, keepdim=True)
