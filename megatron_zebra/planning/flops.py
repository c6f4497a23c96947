"""Floating-point operations of a step, attention counted by exactly the pairs that the masks allow. Pure: no torch.

The convention, stated wherever MFU is: a multiply-add is 2 operations; matrix products and attention's two products
(QK^T and PV) count, nothing else; a masked pair counts nothing; backward is twice the forward; what is computed again
(recomputation, the scores inside a fused backward) is no model FLOP and is reported apart.
"""

from dataclasses import dataclass

import numpy as np

from megatron_zebra.attention.window import Lengths, allowed_pairs, visible_keys
from megatron_zebra.model.architecture import Architecture

CONVENTION = "model FLOPs: matrix products and exactly the allowed query-key pairs; training = 3 x forward"


@dataclass(frozen=True)
class Flops:
    """Operations of some tokens. ``blocks + head`` are the matrix products, ``attention`` QK^T and PV."""

    blocks: int
    head: int
    attention: int

    @property
    def matrix(self) -> int:
        return self.blocks + self.head

    @property
    def total(self) -> int:
        return self.matrix + self.attention

    @property
    def attention_share(self) -> float:
        """Attention's part of the total, 0 to 1."""
        return self.attention / self.total if self.total else 0.0

    def times(self, factor: int) -> "Flops":
        return Flops(self.blocks * factor, self.head * factor, self.attention * factor)


def forward_flops(arch: Architecture, lengths: Lengths) -> Flops:
    """One forward pass over packed documents of ``lengths`` [documents] tokens."""
    return _flops(arch, int(np.sum(lengths, dtype=np.int64)), attention_pairs(arch, lengths))


def train_flops(arch: Architecture, lengths: Lengths) -> Flops:
    """One training step over packed documents: forward, and backward by weights and by inputs (3 x forward)."""
    return forward_flops(arch, lengths).times(3)


def recompute_flops(arch: Architecture, lengths: Lengths, recompute: str) -> int:
    """What ``training.recompute`` computes a second time: hardware FLOPs = train_flops(...).total + this."""
    return recomputed(arch, forward_flops(arch, lengths), recompute)


def recomputed(arch: Architecture, forward: Flops, recompute: str) -> int:
    """What ``training.recompute`` computes a second time of a forward pass of ``arch``, or of some of its layers.

    attention: q, k, v and the attention; full: all but the MLP's last product, whose output no backward needs.
    """
    h, width = arch.hidden_size, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    all_of_a_block = matrix_parameters(arch)[0] // arch.num_layers
    again = {"none": 0, "attention": h * width, "full": all_of_a_block - h * arch.ffn_hidden_size}[recompute]
    return forward.blocks * again // all_of_a_block + (forward.attention if again else 0)


def layer_flops(arch: Architecture, lengths: Lengths) -> list[Flops]:
    """One forward pass of each layer over packed documents of ``lengths`` tokens; with ``head_flops`` all of the model."""
    blocks = 2 * matrix_parameters(arch)[0] // arch.num_layers * int(np.sum(lengths, dtype=np.int64))
    pairs = {window: allowed_pairs(lengths, None, window) for window in _windows(arch)}
    per_pair = 4 * arch.num_heads * arch.head_dim
    return [Flops(blocks, 0, per_pair * pairs[arch.window(layer)]) for layer in range(arch.num_layers)]


def head_flops(arch: Architecture, tokens: int) -> Flops:
    """One forward pass of the head. The embedding is a lookup: no operation in this convention."""
    return Flops(0, 2 * matrix_parameters(arch)[1] * tokens, 0)


def attention_pairs(arch: Architecture, lengths: Lengths) -> int:
    """Allowed query-key pairs summed over layers (one head)."""
    return _over_layers(arch, {window: allowed_pairs(lengths, None, window) for window in _windows(arch)})


def full_attention_flops(arch: Architecture, lengths: Lengths) -> Flops:
    """``forward_flops`` if every layer were global: what the windows save."""
    return _flops(arch, int(np.sum(lengths, dtype=np.int64)), arch.num_layers * allowed_pairs(lengths, None, None))


def uncut_flops(arch: Architecture, lengths: Lengths) -> Flops:
    """The other convention in use, for comparison: forward FLOPs without the causal triangle cut off.

    Every query counts as many keys as the last one of its document sees, in both kinds of layer alike: S x S in a
    global layer, S x min(S, w + 1) in a local one. About twice the pairs in global layers: never the base of MFU here.
    """
    n = np.asarray(lengths, dtype=np.int64)
    pairs = {window: int(np.sum(n * visible_keys(np.maximum(n - 1, 0), window))) for window in _windows(arch)}
    return _flops(arch, int(n.sum()), _over_layers(arch, pairs))


def matrix_parameters(arch: Architecture) -> tuple[int, int]:
    """Weights that each token is multiplied with: (in the blocks, in the head). The embedding is a lookup."""
    h, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return arch.num_layers * h * (2 * q + 2 * kv + 3 * arch.ffn_hidden_size), arch.vocab_size * h


def _flops(arch: Architecture, tokens: int, pairs: int) -> Flops:
    blocks, head = matrix_parameters(arch)
    return Flops(2 * blocks * tokens, 2 * head * tokens, 4 * arch.num_heads * arch.head_dim * pairs)


def _windows(arch: Architecture) -> set[int | None]:
    return {arch.window(layer) for layer in range(arch.num_layers)}


def _over_layers(arch: Architecture, pairs: dict[int | None, int]) -> int:
    return sum(pairs[arch.window(layer)] for layer in range(arch.num_layers))


class StepFlops:
    """``train_flops`` of step after step, with what does not change worked out once. For metrics.

    A step costs two closed-form sums over its document lengths, whatever the number of layers.
    """

    def __init__(self, arch: Architecture) -> None:
        self._per_token = 6 * sum(matrix_parameters(arch))
        self._per_pair = 12 * arch.num_heads * arch.head_dim
        windows = [arch.window(layer) for layer in range(arch.num_layers)]
        self._layers = [(window, windows.count(window)) for window in dict.fromkeys(windows)]

    def __call__(self, lengths: Lengths) -> int:
        """Model FLOPs of a training step whose documents, over all ranks and micro-batches, have ``lengths`` tokens."""
        pairs = sum(count * allowed_pairs(lengths, None, window) for window, count in self._layers)
        return self._per_token * int(np.sum(lengths, dtype=np.int64)) + self._per_pair * pairs
