"""What known GPUs can do: the peak that MFU is measured against, and their memory. Pure: no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of GPU. ``peak_flops`` [FLOP/s] is dense bf16 (no 2:4 sparsity) from the maker's data sheet."""

    name: str
    pattern: str
    peak_flops: float
    memory_bytes: int


_GIB = 2**30

# First match wins, so narrower names stand before wider ones. Patterns meet torch.cuda.get_device_name().
DEVICES = (
    Device("GB300", r"GB300", 2500e12, 279 * _GIB),
    Device("B300", r"B300", 2250e12, 268 * _GIB),
    Device("GB200", r"GB200", 2500e12, 184 * _GIB),
    Device("B200", r"B200", 2250e12, 178 * _GIB),
    Device("H200", r"H200", 989e12, 139 * _GIB),
    Device("H100-NVL", r"H100.*NVL", 835e12, 93 * _GIB),
    Device("H100-PCIe", r"H100.*PCIE", 756e12, 79 * _GIB),
    Device("H100", r"H100|GH200", 989e12, 79 * _GIB),
    Device("H800", r"H800", 989e12, 79 * _GIB),
    Device("H20", r"H20\b", 148e12, 95 * _GIB),
    Device("A100-40GB", r"A100.*40GB", 312e12, 39 * _GIB),
    Device("A100", r"A100|A800", 312e12, 79 * _GIB),
    Device("A40", r"A40\b", 149.7e12, 44 * _GIB),
    Device("A10", r"A10\b", 125e12, 22 * _GIB),
    Device("L40S", r"L40S", 362e12, 44 * _GIB),
    Device("L40", r"L40\b", 181e12, 44 * _GIB),
    Device("L4", r"L4\b", 121e12, 22 * _GIB),
    Device("RTX-6000-Ada", r"RTX 6000 Ada", 364e12, 47 * _GIB),
    Device("5090", r"RTX 5090", 209.5e12, 31 * _GIB),
    Device("4090", r"RTX 4090", 165.2e12, 23 * _GIB),
    Device("3090", r"RTX 3090", 71e12, 23 * _GIB),
    Device("MI355X", r"MI355X", 2500e12, 288 * _GIB),
    Device("MI325X", r"MI325X", 1307e12, 255 * _GIB),
    Device("MI300X", r"MI300X", 1307e12, 191 * _GIB),
    Device("MI250X", r"MI250X", 191.5e12, 63 * _GIB),
)


def find_device(torch_name: str) -> Device | None:
    """The entry for a name as torch reports it (``NVIDIA H100 80GB HBM3``), or None for one not known."""
    return next((device for device in DEVICES if re.search(device.pattern, torch_name, re.IGNORECASE)), None)


def peak_flops(torch_name: str) -> float | None:
    """Peak FLOP/s (bf16, dense) of one device, or None where it is not known: then no MFU is reported."""
    device = find_device(torch_name)
    return device.peak_flops if device else None
