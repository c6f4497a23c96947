"""Rotary position embedding: frequencies by scaling method, phases in fp32."""

import math

import torch

from megatron_zebra.config.sections import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies [head_dim / 2] in fp32, and the factor on cos and sin (1 except for yarn)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "none":
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "dynamic":
        return _dynamic(rope, head_dim, exponents), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, head_dim, plain), _yarn_attention_factor(rope)
    return _llama3(rope, plain), 1.0


def phases(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [T, 1, head_dim / 2] in fp32, of ``positions`` [T]."""
    angles = positions.to(torch.float32)[:, None, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + D/2]) of heads ``x`` [T, H, D] by its angle; computed in fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _dynamic(rope: Rope, head_dim: int, exponents: torch.Tensor) -> torch.Tensor:
    """NTK-aware base for one configured length (a base that follows the call's length fits no cache)."""
    assert rope.original_length is not None
    assert rope.length is not None
    length = max(rope.length, rope.original_length)
    stretch = rope.factor * length / rope.original_length - (rope.factor - 1.0)
    return 1.0 / (rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponents


def _yarn(rope: Rope, head_dim: int, plain: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow dimensions, keep fast ones, blend between."""
    assert rope.original_length is not None

    original = rope.original_length

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: divide low frequencies by the factor, keep high ones, blend smoothly between the two wavelengths."""
    assert rope.original_length is not None
    wavelengths = 2 * math.pi / plain
    smooth = (rope.original_length / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept = smooth.clamp(0, 1)
    return plain / rope.factor * (1 - kept) + plain * kept
