"""Every backend against the dense reference: those that run here directly, the others by what they would be told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_zebra.attention import flash, torch_varlen
from megatron_zebra.attention.contract import attention
from megatron_zebra.attention.reference import dense_mask
from megatron_zebra.attention.registry import BACKENDS
from megatron_zebra.attention.segments import Segments
from megatron_zebra.attention.window import effective_window, visible_keys
from tests.attention import cases
from tests.attention.cases import HEADS, SEGMENTS, WINDOWS, Inputs, S, inputs, run

Attend = Callable[..., torch.Tensor]


def emulated_flash(version: int) -> Attend:
    """``flash.attention`` with flash-attn's function replaced by one that reads its arguments as documented."""

    def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> Any:
        out = cases.masked_attention(q, k, v, cases.flash_mask(version, arguments), arguments["softmax_scale"])
        return (out, None) if version == 4 else out

    def call(*args: Any, **options: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "_version", lambda device, head_dim: version)
            patch.setattr(flash, "_function", lambda version: fake)
            return flash.attention(*args, **options)

    return call


def emulated_torch(*args: Any, **options: Any) -> torch.Tensor:
    def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return cases.masked_attention(q, k, v, cases.torch_mask(arguments), arguments["scale"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", fake)
        return torch_varlen.attention(*args, **options)


def through_contract(name: str) -> Attend:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, **options: Any) -> torch.Tensor:
        return attention(q, k, v, segments, backend=name, window=options["window"])

    return call


def emulated(function: Attend) -> Attend:
    """As the contract would call it, but past its refusal of this device and dtype."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, **options: Any) -> torch.Tensor:
        window = effective_window(options["window"], segments.max_k)
        return function(q, k, v, segments, window=window, scale=q.shape[2] ** -0.5)

    return call


# One way, or several, to run each backend of the registry here. A new backend must be added to it.
WAYS: dict[str, tuple[str, Attend]] = {
    "cpu": ("cpu", through_contract("cpu")),
    "reference": ("reference", through_contract("reference")),
    "flash-attn 2": ("flash", emulated(emulated_flash(2))),
    "flash-attn 3": ("flash", emulated(emulated_flash(3))),
    "flash-attn 4": ("flash", emulated(emulated_flash(4))),
    "torch": ("torch", emulated(emulated_torch)),
}
ways = pytest.mark.parametrize("way", [call for _, call in WAYS.values()], ids=list(WAYS))


def test_W03_no_backend_of_the_registry_skips_these_tests() -> None:
    assert {name for name, _ in WAYS.values()} == set(BACKENDS)
    assert {f"flash-attn {version}" for version in flash.MODULES} <= set(WAYS)


def naive(case: Inputs, window: int | None) -> list[torch.Tensor]:
    """A third way, in its own words: one query at a time."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
        rows = []
        group = q.shape[1] // k.shape[1]
        for s in range(len(segments.cu_q) - 1):
            (a, b), (c, d) = segments.cu_q[s : s + 2].tolist(), segments.cu_k[s : s + 2].tolist()
            for i in range(a, b):
                last = d - (b - i) + 1
                first = c if window is None else max(c, last - 1 - window)
                for h in range(q.shape[1]):
                    weights = (k[first:last, h // group] @ q[i, h] * q.shape[2] ** -0.5).softmax(0)
                    rows.append(weights @ v[first:last, h // group])
        return torch.stack(rows).view(q.shape)

    return run(case, attend)


@ways
@pytest.mark.parametrize("window", [1, 4, 11, None])
def test_W03_all_backends_are_a_loop_over_queries(way: Attend, window: int | None) -> None:
    case = inputs([12, 1, 9], [12, 4, 20])
    cases.assert_equal(run(case, way, window=window), naive(case, window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_cpu_equals_reference_in_fp64(
    lengths: tuple[list[int], list[int] | None], heads: tuple[int, int], window: int | None
) -> None:
    case = inputs(*lengths, heads)
    right = run(case, window=window, backend="reference")
    cases.assert_equal(run(case, window=window, backend="cpu"), right)


@ways
@pytest.mark.parametrize("window", [1, 4, 11, 12, None])
def test_W01_row_sums_of_visible_keys(way: Attend, window: int | None) -> None:
    """With equal scores and one-hot values, the output is the mask divided by its row sums."""
    tokens = 12
    q, k = torch.zeros(tokens, 1, 16, dtype=torch.float64), torch.zeros(tokens, 1, 16, dtype=torch.float64)
    v = torch.eye(tokens, 16, dtype=torch.float64)[:, None]
    segments = Segments.from_lengths([tokens])
    visible = way(q, k, v, segments, window=window)[:, 0, :tokens] > 0
    assert visible.sum(1).tolist() == visible_keys(range(tokens), window).tolist()
    assert torch.equal(visible, dense_mask(segments, window))


@ways
@pytest.mark.parametrize("size", [8, 17, 32, 128])
def test_W09_equal_below_at_and_past_the_window(way: Attend, size: int) -> None:
    window = 16
    case = inputs([size])
    right = run(case, window=window, backend="reference")
    cases.assert_equal(run(case, way, window=window), right)


@ways
@pytest.mark.parametrize("window", [1, 7, 63])
def test_a_key_at_distance_w_plus_1_moves_nothing_and_at_w_does(way: Attend, window: int) -> None:
    """Perturb one key and value; only queries at distances 0 .. w of its document may move, in a pack with a halo."""
    case = inputs([40, 100], [70, 100])
    key = 70 + 20
    with torch.no_grad():
        before = way(case.q, case.k, case.v, case.segments, window=window)
        k, v = case.k.clone(), case.v.clone()
        k[key] += 1
        v[key] += 1
        after = way(case.q, k, v, case.segments, window=window)
    moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == list(range(60, 60 + window + 1))


# --- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 64, 200, None])
@pytest.mark.parametrize("lengths", [SEGMENTS["ragged"], SEGMENTS["ragged halo"]], ids=["ragged", "halo"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_cpu_in_other_precisions(
    dtype: torch.dtype, tolerance: float, lengths: tuple[list[int], list[int] | None], window: int | None
) -> None:
    case = inputs(*lengths, (8, 2), head_dim=32, dtype=dtype)
    exact = Inputs(
        *(x.detach().double().requires_grad_() for x in (case.q, case.k, case.v)), case.d_out.double(), case.segments
    )
    ours = run(case, window=window, backend="cpu")
    assert all(x.dtype == dtype for x in ours)
    cases.assert_equal(ours, run(exact, window=window, backend="reference"), tolerance)


def test_reference_rounds_once_in_bf16() -> None:
    case = inputs([90], head_dim=32, dtype=torch.bfloat16)
    exact = Inputs(*(x.detach().double().requires_grad_() for x in (case.q, case.k, case.v, case.d_out)), case.segments)
    ours, right = (run(c, window=20, backend="reference")[0].double() for c in (case, exact))
    assert ((ours - right).abs() <= right.abs() * 2**-8 + 1e-6).all()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [1, 63, 64, 200, None])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("backend", ["flash", "torch"])
def test_gpu_backends_equal_reference_in_bf16(
    backend: str, lengths: tuple[list[int], list[int] | None], window: int | None
) -> None:
    if not any(map(flash.module_exists, BACKENDS[backend].packages)):
        pytest.skip(f"{backend}: not installed")
    case = inputs(*lengths, (8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    exact = Inputs(
        *(x.detach().double().requires_grad_() for x in (case.q, case.k, case.v)), case.d_out.double(), case.segments
    )
    right = run(exact, window=window, backend="reference")
    cases.assert_equal(run(case, window=window, backend=backend), right, 6e-2)
    # bf16 hides an off-by-one in random values; one-hot values do not.
    one_hot = torch.eye(S, 64, device="cuda", dtype=torch.bfloat16)[:, None].expand(-1, 2, -1)
    zeros = torch.zeros(64, 8, 64, device="cuda", dtype=torch.bfloat16)
    segments = Segments.from_lengths([64], device="cuda")
    visible = attention(zeros, zeros[:, :2], one_hot[:64], segments, window=window, backend=backend)[:, 0] > 0
    assert torch.equal(visible, dense_mask(segments, window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "torch"])
def test_gpu_deterministic_gradients_are_bitwise_equal(backend: str) -> None:
    if not any(map(flash.module_exists, BACKENDS[backend].packages)):
        pytest.skip(f"{backend}: not installed")
    case = inputs([S, 1000], None, (8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(case, window=64, backend=backend, deterministic=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
