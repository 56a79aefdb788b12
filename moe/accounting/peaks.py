"""Dense peak of known accelerators at a dtype: what MFU divides by."""

import re
from typing import Literal, NamedTuple

__all__ = ["PEAKS_SOURCE", "peak_flops"]

PEAKS_SOURCE = "NVIDIA data sheets, dense figures (those with sparsity halved)"


class _Peak(NamedTuple):
    name: str  # regular expression of the name the driver gives
    bf16: float
    fp32: float  # without TF32, which torch leaves off


# operations a second
_PEAKS = (
    _Peak(r"A100", 312e12, 19.5e12),
    _Peak(r"A800", 312e12, 19.5e12),
    _Peak(r"H100 PCIe", 756e12, 51e12),
    _Peak(r"H(100|200) NVL", 835e12, 60e12),
    _Peak(r"H100 80GB HBM3|H800|H200|GH200", 989.4e12, 66.9e12),
    _Peak(r"H20$", 148e12, 44e12),
    _Peak(r"B200|B300", 2250e12, 75e12),
    _Peak(r"L40S", 362.05e12, 91.6e12),
    _Peak(r"L4$", 121e12, 30.3e12),
    _Peak(r"A10$", 125e12, 31.2e12),
    _Peak(r"RTX 4090", 165.2e12, 82.6e12),
    _Peak(r"RTX 5090", 209.5e12, 104.8e12),
)


def peak_flops(device_name: str, precision: Literal["fp32", "bf16", "fp8"]) -> float | None:
    """Operations a second of matrix products on one device, by the name the driver gives; None when it is not listed.

    bf16 on the tensor cores, accumulated in fp32; fp32 outside them. For fp8 that of bf16: only the routed experts'
    products are in 8 bits, and the same work in less time shall have the higher MFU.
    """
    for peak in _PEAKS:
        if re.search(peak.name, device_name):
            return peak.fp32 if precision == "fp32" else peak.bf16
    return None
