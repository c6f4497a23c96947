"""Cross entropy of a large vocabulary: a chunk of tokens at a time, its gradient taken in the forward."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_zebra.model.distill import Guide, divergence
from megatron_zebra.parallel.group import Group

IGNORE = -100


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    first: int = 0,
    tp: Group | None = None,
    split_backward: bool = False,
    guide: Guide | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Negative log-likelihood of ``labels`` under ``softmax(hidden weight^T)``, the vocabulary divided over ``tp``.

    Args:
        hidden: [T, h].
        weight: [V, h], or this rank's rows ``first``, ``first + 1``, ... of it.
        labels: [T] int64, IGNORE where there is no target.
        chunk_size: tokens whose logits [chunk, rows] exist at once, in fp32.
        split_backward: backward runs once for ``hidden`` and once for ``weight``, so that it must leave its state as it is.
        guide: a teacher to stay near to (in training only: without gradients it is not asked).

    Returns:
        The sum over valid targets (fp32, differentiable; of the mixture with a guide), each token's loss [T] (fp32, 0 where
        ignored, detached), and with a guide each token's divergence from it [T], likewise. All are the same on all ranks;
        the gradient of ``hidden`` is each rank's part of a sum.
    """
    tp = tp or Group.alone("tp")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, losses, apart = _ChunkedLoss.apply(hidden, weight, labels, chunk_size, first, tp, split_backward, guide)
        return total, losses, apart if guide else None
    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size))
    losses = torch.cat([_losses(_logits(h, weight), y, first, tp)[0] for h, y in chunks])
    return losses.sum(), losses, None


class _ChunkedLoss(torch.autograd.Function):
    """The gradient for a sum needs no later value, so each chunk's logits are used up and dropped at once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        chunk_size: int,
        first: int,
        tp: Group,
        split_backward: bool,
        guide: Guide | None,
    ) -> Any:
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden)
        # A frozen head has no gradient, nor the memory for one.
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        apart = torch.zeros_like(losses)
        for start in range(0, len(labels), chunk_size):
            part = slice(start, start + chunk_size)
            logits = _logits(hidden[part], weight)
            losses[part], log_normalizer = _losses(logits, labels[part], first, tp)
            if guide is not None:
                apart[part], pull = divergence(logits, guide.logits(part, wide), guide.temperature, tp)
            grad = logits.sub_(log_normalizer[:, None]).exp_()
            target, own = _own_targets(labels[part], first, len(weight))
            if len(weight):
                grad.scatter_add_(1, target[:, None], -own[:, None].to(grad.dtype))
            if guide is not None:
                grad.mul_(1.0 - guide.share).add_(pull, alpha=guide.share)
            grad = grad.mul_((labels[part] != IGNORE)[:, None]).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is None:
                continue
            if weight.dtype == wide:
                grad_weight.addmm_(grad.t(), hidden[part])
            else:
                grad_weight += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.chunk_size, ctx.split_backward = weight.dtype, chunk_size, split_backward
        apart.masked_fill_(labels == IGNORE, 0.0)
        ctx.mark_non_differentiable(losses, apart)
        total = losses.sum()
        if guide is not None:
            total = (1.0 - guide.share) * total + guide.share * apart.sum()
        return total, losses, apart

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.split_backward:
            grad_hidden = (grad_hidden.to(grad.dtype) * grad).to(grad_hidden.dtype)
            return grad_hidden, None if grad_weight is None else (grad_weight * grad).to(ctx.dtype), *(None,) * 6
        # In place: the two live nowhere else and at long context are the largest tensors of the loss. In fp32, because a
        # factor that is a tensor on a GPU would be rounded to bf16 first.
        for part in grad_hidden.split(ctx.chunk_size):
            part.copy_(part.to(grad.dtype) * grad)
        return grad_hidden, None if grad_weight is None else grad_weight.mul_(grad).to(ctx.dtype), *(None,) * 6


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight).to(torch.promote_types(weight.dtype, torch.float32))


def _own_targets(labels: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's row among this rank's (0 where it is not among them), and whether it is."""
    target = labels - first
    own = (target >= 0) & (target < rows) & (labels != IGNORE)
    return target.masked_fill(~own, 0), own


def _losses(logits: torch.Tensor, labels: torch.Tensor, first: int, tp: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-normaliser of each token, [T], over the whole vocabulary."""
    log_normalizer = logits.logsumexp(-1)
    target, own = _own_targets(labels, first, logits.shape[1])
    score = logits.gather(1, target[:, None])[:, 0] if logits.shape[1] else torch.zeros_like(log_normalizer)
    if tp.size > 1:
        largest = tp.all_reduce(log_normalizer.clone(), dist.ReduceOp.MAX)
        sums = torch.stack([(log_normalizer - largest).exp(), score.masked_fill(~own, 0.0)])
        tp.all_reduce(sums)
        log_normalizer, score = largest + sums[0].log(), sums[1]
    return torch.where(labels != IGNORE, log_normalizer - score, 0.0), log_normalizer
