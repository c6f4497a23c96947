"""Backends declare what they do; what they do not is refused by name when the model is built."""

import re

import pytest
import torch

from megatron_zebra.attention import registry
from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.registry import BACKENDS, Backend, check_backend, load_backend, resolve_backend
from megatron_zebra.attention.segments import Segments


def check(name: str, device: str = "cpu", dtype: object = torch.float32, **changes: int) -> None:
    options = {"head_dim": 64, "num_heads": 8, "num_kv_heads": 2, "window": 512} | changes
    check_backend(name, device, dtype, **options, layer="layer 3 (local)")


def test_every_backend_loads_and_its_declaration_is_whole() -> None:
    for name, backend in BACKENDS.items():
        assert backend.name == name
        assert backend.devices
        assert backend.dtypes
        assert callable(load_backend(name))  # no optional package is imported for it


@pytest.mark.parametrize(
    ("name", "device", "dtype", "changes", "reason"),
    [
        ("cpu", "cuda", torch.float32, {}, "runs on cpu, not on cuda"),
        ("flash", "cpu", torch.bfloat16, {}, "runs on cuda, not on cpu"),
        ("torch", "cpu", torch.bfloat16, {}, "runs on cuda, not on cpu"),
        ("flash", "cuda", torch.float32, {}, "computes in float16, bfloat16, not in float32"),
        ("torch", "cuda", "fp32", {}, "computes in float16, bfloat16, not in float32"),
        ("flash", "cuda", "bf16", {"head_dim": 264}, "takes a head_dim of at most 256, not 264"),
        ("torch", "cuda", "bf16", {"head_dim": 36}, "takes a head_dim that is a multiple of 8, not 36"),
        (
            "cpu",
            "cpu",
            torch.float32,
            {"num_kv_heads": 3},
            "needs num_heads to be a multiple of num_kv_heads, not 8 and 3",
        ),
        ("eager", "cpu", torch.float32, {}, "does not exist; allowed: flash, torch, cpu, reference"),
        ("flash", "cuda", "bf16", {}, "is not installed"),
    ],
)
def test_refusals_name_backend_and_layer(
    name: str, device: str, dtype: object, changes: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry._refusal.cache_clear()
    monkeypatch.setattr(registry, "module_exists", lambda module: False)
    with pytest.raises(ValueError, match=re.escape(f"attention backend {name!r} of layer 3 (local) {reason}")) as error:
        check(name, device, dtype, **changes)
    assert "\n" not in str(error.value)
    registry._refusal.cache_clear()


def test_W07_a_backend_without_windows_is_refused_never_full_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Backend("plain", "megatron_zebra.attention.reference", ("cpu",), ("float32",), windows=False)
    monkeypatch.setitem(BACKENDS, "plain", plain)
    with pytest.raises(ValueError, match=re.escape("'plain' of layer 3 (local) has no windows")):
        check("plain")
    x, segments = torch.zeros(40, 2, 8), Segments.from_lengths([40])
    with pytest.raises(ValueError, match="'plain' has no windows"):
        attention(x, x, x, segments, window=4, backend="plain")
    attention(x, x, x, segments, window=None, backend="plain")


def test_other_gaps_that_a_backend_declares_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Backend(
        "poor",
        "megatron_zebra.attention.reference",
        ("cpu",),
        ("float32",),
        grouped_queries=False,
        deterministic=False,
        fewer_queries=False,
    )
    monkeypatch.setitem(BACKENDS, "poor", poor)
    check("poor", num_kv_heads=8)
    with pytest.raises(ValueError, match="grouped-query"):
        check("poor")
    with pytest.raises(ValueError, match="deterministic"):
        check_backend("poor", "cpu", "fp32", 64, 8, 8, None, deterministic=True)
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(x[:3], x, x, Segments.from_lengths([3], [4]), window=None, backend="poor")


def test_P06_pairs_do_not_reach_a_backend() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(TypeError, match="window must be an int"):
        attention(x, x, x, Segments.from_lengths([4]), window=(2, 0), backend="cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="window must be an int"):
        check_backend("cpu", "cpu", "fp32", 64, 8, 8, (2, 0))  # type: ignore[arg-type]


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "cpu"
    assert resolve_backend("reference", "cuda", torch.float32) == "reference"
    monkeypatch.setattr(registry, "module_exists", lambda module: module.startswith("flash_attn"))
    assert resolve_backend("auto", "cuda", "bf16") == "flash"
    monkeypatch.setattr(registry, "module_exists", lambda module: module.startswith("torch"))
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="float32 on cuda"):
        resolve_backend("auto", "cuda", "fp32")
    with pytest.raises(ValueError, match="'eager' does not exist"):
        resolve_backend("eager", "cpu", "fp32")


def test_packages_are_found_without_importing_them() -> None:
    assert registry.module_exists("torch.nn.attention.varlen")
    assert registry.module_exists("torch")
    assert not registry.module_exists("torch.no_such_thing")
    assert not registry.module_exists("no_such_package.at_all")
