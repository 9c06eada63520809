"""What the device could do at best: the denominator of the MFU.

Datasheet peaks are dense matrix rates (no sparsity) of one card, in FLOP/s, as the vendors print them: NVIDIA's V100,
T4, A10, A30, A40, A100, L4, L40(S), H100, H200, H20 and B200 datasheets and Ampere / Ada / Blackwell whitepapers, AMD's
Instinct datasheets. Where there is no datasheet entry, as on a CPU, the rate of a short measured matrix product stands
in, and the ratio is called what it is: a fraction of the measured GEMM peak.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

DATASHEET = "MFU"
MEASURED = "fraction of measured GEMM peak"


@dataclass(frozen=True, slots=True)
class Peak:
    """flops: FLOP/s of the whole job. meaning: what a ratio to it is called (DATASHEET or MEASURED)."""

    flops: float
    meaning: str


# (pattern on the device's name, 16-bit tensor rate, TF32 tensor rate, plain fp32 rate) in TFLOP/s; first match wins.
_TERA: tuple[tuple[str, float, float, float], ...] = (
    (r"GB200|GB300", 2500.0, 1250.0, 80.0),
    (r"B200|B300", 2250.0, 1125.0, 75.0),
    (r"B100", 1750.0, 875.0, 60.0),
    (r"GH200|H200", 989.4, 494.7, 66.9),
    (r"H100 PCIe", 756.0, 378.0, 51.2),
    (r"H100 NVL", 835.0, 417.5, 60.0),
    (r"H100|H800", 989.4, 494.7, 66.9),
    (r"H20\b", 148.0, 74.0, 44.0),
    (r"A100|A800", 312.0, 156.0, 19.5),
    (r"A10G\b", 70.0, 35.0, 35.0),
    (r"A10\b", 125.0, 62.5, 31.2),
    (r"A30\b", 165.0, 82.0, 10.3),
    (r"A40\b", 149.7, 74.8, 37.4),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 6000 Ada", 364.2, 182.1, 91.1),
    (r"L40S", 362.0, 183.0, 91.6),
    (r"L40\b", 181.0, 90.5, 90.5),
    (r"L4\b", 121.0, 60.0, 30.3),
    (r"V100S", 130.0, 16.4, 16.4),
    (r"V100.*PCIE", 112.0, 14.0, 14.0),
    (r"V100", 125.0, 15.7, 15.7),
    (r"T4\b", 65.0, 8.1, 8.1),
    (r"RTX 5090\b(?! D)", 209.5, 104.8, 104.8),
    (r"RTX 4090\b(?! D)", 165.2, 82.6, 82.6),
    (r"RTX 3090\b(?! Ti)", 71.0, 35.6, 35.6),
    (r"MI325X|MI300X", 1307.4, 653.7, 163.4),
    (r"MI250X", 191.5, 47.9, 47.9),  # one of the card's two dies, which is what the runtime calls a device
    (r"MI210", 181.0, 45.3, 45.3),
)


def datasheet(name: str, *, precision: str, tf32: bool = False) -> float | None:
    """FLOP/s of one card by its name, for `precision` fp32, bf16 or fp16; None for a card that is not in the table.

    A laptop's card bears the name of a faster one, so it is not in the table. Cards before Ampere have no bf16 units,
    and the emulation has no datasheet peak: None.
    """
    for pattern, half, tensor32, single in _TERA:
        if re.search(pattern, name) and "Laptop" not in name:
            if precision == "fp32":
                return (tensor32 if tf32 else single) * 1e12
            return None if precision == "bf16" and re.search(r"V100|T4\b", name) else half * 1e12
    return None


def peak(device: torch.device, *, precision: str) -> Peak:
    """The best this rank's device can do in `precision` (fp32, bf16, fp16). The job's peak is the sum over ranks."""
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        flops = datasheet(torch.cuda.get_device_name(device), precision=precision, tf32=tf32)
        if flops is not None:
            return Peak(flops, DATASHEET)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Peak(measure(device, dtype=dtype), MEASURED)


def measure(device: torch.device, *, dtype: torch.dtype, seconds: float = 0.2, largest: int = 2048) -> float:
    """FLOP/s of the best square matrix product, with the threads this process has, in about `seconds`.

    Five products or more of each size; the size doubles when five of the next fit into the time, so a device without
    native support for `dtype` is measured on small ones. The best of many is what a busy machine disturbs least.
    """
    best, size, stop = 0.0, 256, time.perf_counter() + seconds
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        fastest = min(_once(a) for _ in range(5))
        fits = time.perf_counter() + 5 * 8 * fastest < stop and size < largest
        while not fits and time.perf_counter() + fastest < stop:
            fastest = min(fastest, _once(a))
        best = max(best, 2.0 * size**3 / fastest)
        if not fits:
            return best
        size *= 2


def _once(a: torch.Tensor) -> float:
    started = time.perf_counter()
    a @ a
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - started, 1e-9)
