"""What known GPUs can do: the peak that MFU is measured against, and their memory. Pure: no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of GPU, from its maker's data sheet.

    ``peak_flops`` [FLOP/s] is dense bf16 (no 2:4 sparsity); ``memory_rate`` its memory's and ``link`` what it receives from
    the GPUs of its node, in bytes/s.
    """

    name: str
    pattern: str
    peak_flops: float
    memory_bytes: int
    memory_rate: float
    link: float


_GIB = 2**30

# First match wins, so narrower names stand before wider ones. Patterns meet torch.cuda.get_device_name().
DEVICES = (
    Device("GB300", r"GB300", 2500e12, 279 * _GIB, 8e12, 9e11),
    Device("B300", r"B300", 2250e12, 268 * _GIB, 8e12, 9e11),
    Device("GB200", r"GB200", 2500e12, 184 * _GIB, 8e12, 9e11),
    Device("B200", r"B200", 2250e12, 178 * _GIB, 8e12, 9e11),
    Device("H200", r"H200", 989e12, 139 * _GIB, 4.8e12, 4.5e11),
    Device("H100-NVL", r"H100.*NVL", 835e12, 93 * _GIB, 3.9e12, 3e11),
    Device("H100-PCIe", r"H100.*PCIE", 756e12, 79 * _GIB, 2e12, 6.4e10),
    Device("H100", r"H100|GH200", 989e12, 79 * _GIB, 3.35e12, 4.5e11),
    Device("H800", r"H800", 989e12, 79 * _GIB, 3.35e12, 2e11),
    Device("H20", r"H20\b", 148e12, 95 * _GIB, 4e12, 4.5e11),
    Device("A100-40GB", r"A100.*40GB", 312e12, 39 * _GIB, 1.555e12, 3e11),
    Device("A100", r"A100|A800", 312e12, 79 * _GIB, 2e12, 3e11),
    Device("A40", r"A40\b", 149.7e12, 44 * _GIB, 6.96e11, 3.2e10),
    Device("A10", r"A10\b", 125e12, 22 * _GIB, 6e11, 3.2e10),
    Device("L40S", r"L40S", 362e12, 44 * _GIB, 8.64e11, 3.2e10),
    Device("L40", r"L40\b", 181e12, 44 * _GIB, 8.64e11, 3.2e10),
    Device("L4", r"L4\b", 121e12, 22 * _GIB, 3e11, 3.2e10),
    Device("RTX-6000-Ada", r"RTX 6000 Ada", 364e12, 47 * _GIB, 9.6e11, 3.2e10),
    Device("5090", r"RTX 5090", 209.5e12, 31 * _GIB, 1.79e12, 6.4e10),
    Device("4090", r"RTX 4090", 165.2e12, 23 * _GIB, 1.008e12, 3.2e10),
    Device("3090", r"RTX 3090", 71e12, 23 * _GIB, 9.36e11, 3.2e10),
    Device("MI355X", r"MI355X", 2500e12, 288 * _GIB, 8e12, 5.38e11),
    Device("MI325X", r"MI325X", 1307e12, 255 * _GIB, 6e12, 4.48e11),
    Device("MI300X", r"MI300X", 1307e12, 191 * _GIB, 5.3e12, 4.48e11),
    Device("MI250X", r"MI250X", 191.5e12, 63 * _GIB, 3.2e12, 2.5e11),
)


def find_device(torch_name: str) -> Device | None:
    """The entry for a name as torch reports it (``NVIDIA H100 80GB HBM3``), or None for one not known."""
    return next((device for device in DEVICES if re.search(device.pattern, torch_name, re.IGNORECASE)), None)


def peak_flops(torch_name: str) -> float | None:
    """Peak FLOP/s (bf16, dense) of one device, or None where it is not known: then no MFU is reported."""
    device = find_device(torch_name)
    return device.peak_flops if device else None
