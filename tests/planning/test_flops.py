"""FLOPs: against ZEBRA.md's and FAULTS' figures, a dense mask's sum, and torch's own counter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.config.sections import Model
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.planning import flops


def small(**keys: object) -> Architecture:
    values = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "window_size": 5,
    }
    return resolve(Model(**{**values, **keys}), 97, 64)


def llama2_7b(group: int) -> Architecture:
    model = Model(
        hidden_size=4096, num_layers=32, num_heads=32, ffn_hidden_size=11008, layer_group_size=group, window_size=512
    )
    return resolve(model, 32000, 4096)


def dense_pairs(length: int, window: int | None) -> int:
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    return int(((j <= i) & (True if window is None else j >= i - window)).sum())


def test_f01_window_layers_count_their_window_only() -> None:
    """F01: at S = 32768, 1024 keys a query: 33,030,656 pairs a head, not the full triangle's 536,887,296."""
    local = small(num_layers=2, layer_kinds=["local", "local"], window_size=1023)
    assert flops.attention_pairs(local, [32768]) == 2 * 33_030_656
    full = small(num_layers=1, layer_kinds=["global"])
    assert flops.attention_pairs(full, [32768]) == 536_887_296


def test_f04_the_uncut_convention_treats_both_kinds_alike() -> None:
    """F04: without the causal cut both kinds count S x (keys of the last query); the other convention never mixes in."""
    arch = small(window_size=5)
    per_pair = 4 * arch.num_heads * arch.head_dim
    lengths = [40, 3, 6]
    expected = sum(n * n + 3 * n * min(n, 6) for n in lengths)
    uncut, exact = flops.uncut_flops(arch, lengths), flops.forward_flops(arch, lengths)
    assert uncut.attention == per_pair * expected
    assert uncut.matrix == exact.matrix
    assert exact.attention < uncut.attention < 2 * exact.attention


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.integers(1, 50),
    group=st.integers(1, 5),
)
@settings(max_examples=50, deadline=None)
def test_attention_is_a_dense_masks_sum(lengths: list[int], window: int, group: int) -> None:
    arch = small(window_size=window, layer_group_size=group)
    pairs = sum(dense_pairs(n, arch.window(layer)) for layer in range(arch.num_layers) for n in lengths)
    assert flops.attention_pairs(arch, lengths) == pairs
    assert flops.forward_flops(arch, np.array(lengths)).attention == 4 * 4 * 8 * pairs
    assert flops.StepFlops(arch)(np.array(lengths, dtype=np.int32)) == flops.train_flops(arch, lengths).total
    full = small(layer_group_size=1)
    assert flops.full_attention_flops(arch, lengths) == flops.forward_flops(full, lengths)


@pytest.mark.parametrize(
    ("group", "speedups"),
    [
        (2, (1.03, 1.13, 1.24, 1.39, 1.56, 1.72, 1.91)),
        (4, (1.05, 1.21, 1.40, 1.72, 2.16, 2.68, 3.51)),
        (8, (1.05, 1.25, 1.50, 1.95, 2.68, 3.72, 6.03)),
    ],
)
def test_speedups_of_zebra_md(group: int, speedups: tuple[float, ...]) -> None:
    """The table of Llama-2-7B in ZEBRA.md, S = 4k ... 1M."""
    arch = llama2_7b(group)
    for length, expected in zip((4, 16, 32, 64, 128, 256, 1024), speedups):
        s = [length * 1024]
        ratio = flops.full_attention_flops(arch, s).total / flops.forward_flops(arch, s).total
        assert round(ratio, 2) == pytest.approx(expected, abs=0.011)


def test_recomputation_is_reported_apart() -> None:
    arch, lengths = small(), [50, 14]
    forward, train = flops.forward_flops(arch, lengths), flops.train_flops(arch, lengths)
    assert train.total == 3 * forward.total
    assert flops.recompute_flops(arch, lengths, "none") == 0
    qkv, down = 4 * 2 * 32 * (4 + 2 * 2) * 8, 4 * 2 * 32 * 48  # of a token, all layers
    assert flops.recompute_flops(arch, lengths, "attention") == 64 * qkv + forward.attention
    assert flops.recompute_flops(arch, lengths, "full") == forward.total - forward.head - 64 * down


@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_what_is_computed_again_is_what_torch_counts(recompute: str) -> None:
    """Matrix products alone: attention's scores are batched ones, and the fused backward has more of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_zebra.attention.segments import Segments
    from megatron_zebra.model.decoder import Decoder
    from megatron_zebra.model.initialize import Initializer

    arch, ids = small(), torch.arange(64)

    def products(mode: str) -> int:
        init = Initializer(1, 0.02, arch.num_layers, torch.float32, torch.device("cpu"))
        model = Decoder(arch, init, recompute=mode)
        with FlopCounterMode(display=False) as counter:
            model(ids, ids, Segments.from_lengths([64]), ids).sum.backward()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))

    again = flops.recompute_flops(arch, [64], recompute) - flops.forward_flops(arch, [64]).attention
    assert products(recompute) - products("none") == again


def test_a_long_and_wide_step_does_not_overflow() -> None:
    arch = llama2_7b(1)
    million = flops.train_flops(arch, np.full(4096, 2**20, dtype=np.int32))
    assert million.attention == 12 * 32 * 128 * 32 * 4096 * (2**20 * (2**20 + 1) // 2)


def test_no_tokens_cost_nothing() -> None:
    assert flops.forward_flops(small(), []).total == 0
    assert flops.forward_flops(small(), []).attention_share == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_matrix_products_equal_torchs_counter(tied: bool) -> None:
    """Forward and backward of the real model under torch's counter, which counts the CPU kernel as nothing."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_zebra.attention.segments import Segments
    from megatron_zebra.model.decoder import Decoder
    from megatron_zebra.model.initialize import Initializer

    arch = small(tie_embeddings=tied)
    init = Initializer(1, 0.02, arch.num_layers, torch.float32, torch.device("cpu"))
    model = Decoder(arch, init, backend="cpu", loss_chunk_size=16)
    lengths = [33, 20, 11]
    tokens = torch.randint(0, arch.vocab_size, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])

    def in_place(out: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: object) -> int:
        return 2 * a[0] * a[1] * b[1]  # the counter knows addmm, not addmm_

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        model(tokens, positions, Segments.from_lengths(lengths), tokens).sum.backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "scaled_dot_product" not in str(op))
    assert products == flops.train_flops(arch, lengths).matrix
