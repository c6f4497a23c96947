"""Distillation: the divergence from a teacher's predictions, a chunk of tokens at a time, the vocabulary divided over tp."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_zebra.parallel.group import Group


@dataclass(frozen=True)
class Guide:
    """What a teacher says of a micro-batch: ``hidden`` [T, h] before its head ``weight`` [rows, h], the rows that this
    rank also holds of the model's own head. The loss is (1 - ``share``) cross entropy + ``share`` temperature^2 KL.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    share: float
    temperature: float

    def logits(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Of some tokens: [n, rows]."""
        return F.linear(self.hidden[part], self.weight).to(dtype)


def divergence(
    logits: torch.Tensor, teacher: torch.Tensor, temperature: float, tp: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """temperature^2 KL(teacher || model) over the whole vocabulary, and its gradient by ``logits``.

    Args:
        logits, teacher: [n, rows], this rank's part of the vocabulary; ``teacher`` is used up.

    Returns:
        [n], the same on all ranks, and [n, rows].
    """
    own, other = _log_probabilities(logits / temperature, tp), _log_probabilities(teacher.div_(temperature), tp)
    wanted = other.exp()
    each = tp.all_reduce(torch.linalg.vecdot(wanted, other.sub_(own))) * temperature**2
    return each, own.exp_().sub_(wanted).mul_(temperature)


def _log_probabilities(logits: torch.Tensor, tp: Group) -> torch.Tensor:
    """``logits`` less their log-normaliser over the whole vocabulary; in place."""
    log_sum = logits.logsumexp(-1)
    if tp.size > 1:
        largest = tp.all_reduce(log_sum.clone(), dist.ReduceOp.MAX)
        log_sum = largest + tp.all_reduce((log_sum - largest).exp()).log()
    return logits.sub_(log_sum[:, None])
