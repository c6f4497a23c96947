"""The table: how each parameter is divided over tensor-parallel ranks. Tensor parallelism, checkpoints and conversion read it.

Column-parallel maps and the vocabulary are split by their outputs (dimension 0), row-parallel maps by their inputs
(dimension 1); everything else is whole on every rank. With more ranks than KV heads the K and V projections are whole
too: each rank uses the rows of its own head. Of a LoRA adapter, that matrix is split which shares the split dimension
with the weight: B [out, r] of a column-parallel map, A [r, in] of a row-parallel one. Pure; imports no torch.
"""

from dataclasses import dataclass

_SPLIT = {
    "embedding": 0,
    "head": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "o_proj": 1,
    "down_proj": 1,
}
_WHOLE_OF_ADAPTER = {"lora_a": 0, "lora_b": 1}  # in this dimension an adapter has its rank, which is never split
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """One rank's part of a parameter: elements ``offsets .. offsets + shape`` of the whole.

    ``padded`` is the shape that it has in memory: rows of the vocabulary beyond ``shape`` belong to no token.
    """

    offsets: Shape
    shape: Shape
    padded: Shape


@dataclass(frozen=True)
class Sharding:
    """The parts of rank ``rank`` of ``tp``. ``vocab_multiple``: each rank's rows of the vocabulary are padded to it."""

    tp: int = 1
    rank: int = 0
    num_kv_heads: int = 1
    vocab_multiple: int = 1

    def dimension(self, name: str) -> int | None:
        """The dimension in which parameter ``name`` is split; None = whole on every rank."""
        module, kind = name.split(".")[-2:]
        if self.tp == 1 or (module in ("k_proj", "v_proj") and self.tp > self.num_kv_heads):
            return None
        dimension = _SPLIT.get(module)
        return None if dimension == _WHOLE_OF_ADAPTER.get(kind) else dimension

    def box(self, name: str, shape: Shape) -> Box:
        """The part of a parameter of the whole ``shape`` that this rank holds."""
        shape = tuple(shape)
        if name.split(".")[-2] in ("embedding", "head"):
            return self._vocabulary(shape)
        dim = self.dimension(name)
        if dim is None:
            return Box((0,) * len(shape), shape, shape)
        size, rest = divmod(shape[dim], self.tp)
        if rest:
            raise ValueError(f"{name}: dimension {dim} of {list(shape)} cannot be divided by tp = {self.tp}")
        local = (*shape[:dim], size, *shape[dim + 1 :])
        return Box(tuple(size * self.rank if i == dim else 0 for i in range(len(shape))), local, local)

    def kv_heads(self) -> slice:
        """The KV heads that this rank uses, among those whose weights it holds."""
        if self.tp <= self.num_kv_heads:
            return slice(0, self.num_kv_heads // self.tp)
        head = self.rank * self.num_kv_heads // self.tp
        return slice(head, head + 1)

    def _vocabulary(self, shape: Shape) -> Box:
        multiple = self.vocab_multiple
        rows = -(-shape[0] // (self.tp * multiple)) * multiple
        start = min(rows * self.rank, shape[0])
        real = min(rows, shape[0] - start)
        return Box((start, 0), (real, *shape[1:]), (rows, *shape[1:]))
