"""What flash-attn and torch's varlen function are told, beside the masks that test_backends reads from it."""

from pathlib import Path

import pytest
import torch

from megatron_zebra.attention import flash, torch_varlen
from megatron_zebra.attention.flash import choose_version
from megatron_zebra.attention.segments import Segments
from megatron_zebra.errors import UserError

ALL = frozenset({2, 3, 4})


@pytest.mark.parametrize(
    ("capability", "head_dim", "installed", "version"),
    [
        ((8, 0), 128, ALL, 2),
        ((8, 9), 256, ALL, 2),
        ((9, 0), 128, ALL, 3),
        ((9, 0), 128, {2, 4}, 2),
        ((9, 0), 128, {4}, 4),
        ((10, 0), 128, ALL, 4),
        ((12, 0), 64, {2, 4}, 4),
    ],
)
def test_version_follows_the_gpu(
    capability: tuple[int, int], head_dim: int, installed: frozenset[int], version: int
) -> None:
    assert choose_version(capability, head_dim, frozenset(installed)) == version


@pytest.mark.parametrize(
    ("capability", "head_dim", "installed"),
    [((7, 5), 64, ALL), ((10, 0), 128, {2}), ((10, 0), 256, ALL), ((8, 0), 64, ())],
)
def test_no_version_is_said_in_one_line(capability: tuple[int, int], head_dim: int, installed: frozenset[int]) -> None:
    with pytest.raises(ValueError, match=rf"'flash'.*head_dim {head_dim} on compute capability {capability[0]}"):
        choose_version(capability, head_dim, frozenset(installed))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_arguments(version: int) -> None:
    segments = Segments.from_lengths([3, 2], [3, 8])
    arguments = flash.arguments(version, segments, 4, 0.5, True)
    assert arguments["window_size"] == (4, 0)
    assert arguments["causal"] is True
    assert arguments["deterministic"] is True
    assert arguments["softmax_scale"] == 0.5
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (3, 8)
    assert arguments["cu_seqlens_q"].dtype == arguments["cu_seqlens_k"].dtype == torch.int32
    full = flash.arguments(version, segments, None, 0.5, False)
    assert full["window_size"] == ((None, None) if version == 4 else (-1, 0))
    assert full["causal"] is True


def test_torch_arguments() -> None:
    segments = Segments.from_lengths([3, 2], [3, 8])
    arguments = torch_varlen.arguments(segments, 4, 0.5, grouped=True)
    assert arguments["window_size"] == (4, 0)
    assert arguments["enable_gqa"] is True
    # A tuple, since varlen_attn compares it with (-1, 0) to know that it is causal.
    assert torch_varlen.arguments(segments, None, 0.5, grouped=False)["window_size"] == (-1, 0)


def test_torch_names_are_those_of_varlen_attn() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = torch_varlen.arguments(Segments.from_lengths([3]), 4, 0.5, grouped=True)
    assert set(names) <= set(inspect.signature(varlen_attn).parameters)


def test_torch_is_deterministic_only_where_torch_is() -> None:
    x = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match="use_deterministic_algorithms"):
        torch_varlen.attention(x, x, x, Segments.from_lengths([3]), window=None, scale=1.0, deterministic=True)


def test_a_flash_attn_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_flash.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flash.MODULES, 2, "broken_flash")
    flash._function.cache_clear()
    with pytest.raises(
        UserError, match=r"'flash': broken_flash .* \(undefined symbol: _ZN3c10\); build .* or set model"
    ):
        flash._function(2)
