"""Cross entropy of a large vocabulary: a chunk of tokens at a time, its gradient taken in the forward."""

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


def token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of ``labels`` under ``softmax(hidden weight^T)``.

    Args:
        hidden: [T, h].
        weight: [V, h].
        labels: [T] int64, IGNORE where there is no target.
        chunk_size: tokens whose logits [chunk, V] exist at once, in fp32.

    Returns:
        The sum over valid targets (fp32, differentiable), and each token's loss [T] (fp32, 0 where ignored, detached).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLoss.apply(hidden, weight, labels, chunk_size)
    losses = torch.cat(
        [_losses(_logits(h, weight), y)[0] for h, y in zip(hidden.split(chunk_size), labels.split(chunk_size))]
    )
    return losses.sum(), losses


class _ChunkedLoss(torch.autograd.Function):
    """The gradient for a sum needs no later value, so each chunk's logits are used up and dropped at once."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int) -> Any:  # type: ignore[override]
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        for start in range(0, len(labels), chunk_size):
            part = slice(start, start + chunk_size)
            logits = _logits(hidden[part], weight)
            losses[part], log_normalizer = _losses(logits, labels[part])
            grad = logits.sub_(log_normalizer[:, None]).exp_()
            valid = labels[part] != IGNORE
            target = labels[part].clamp_min(0)[:, None]
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
            grad = grad.mul_(valid[:, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if weight.dtype == wide:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.chunk_size = weight.dtype, chunk_size
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: the two live nowhere else and at long context are the largest tensors of the loss. In fp32, because a
        # factor that is a tensor on a GPU would be rounded to bf16 first.
        for part in grad_hidden.split(ctx.chunk_size):
            part.copy_(part.to(grad.dtype) * grad)
        return (grad_hidden, grad_weight.mul_(grad).to(ctx.dtype), None, None)


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight).to(torch.promote_types(weight.dtype, torch.float32))


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_normalizer = logits.logsumexp(-1)
    target = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels != IGNORE, log_normalizer - target, 0.0), log_normalizer
