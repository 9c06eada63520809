"""The denominator of the MFU."""

from __future__ import annotations

import pytest
import torch

from lmtrain import hardware
from lmtrain.hardware import DATASHEET, MEASURED, datasheet, measure, peak


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65.0),
        ("NVIDIA T400", "fp16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Some Card 9000", "bf16", None),
    ],
)
def test_datasheets_are_found_by_the_name_the_driver_gives(name: str, precision: str, tera: float | None) -> None:
    assert datasheet(name, precision=precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_tf32_counts_only_when_it_is_on() -> None:
    assert datasheet("NVIDIA A100-SXM4-80GB", precision="fp32", tf32=True) == pytest.approx(156e12)


@pytest.mark.parametrize("rate", [1e9, 1e11, 1e12])
def test_a_measurement_finds_the_best_rate_and_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    now, sizes = [0.0], []

    def once(a: torch.Tensor) -> float:  # small products reach half the rate, and every other one is disturbed
        size = a.shape[0]
        sizes.append(size)
        taken = 2.0 * size**3 / (rate if size >= 512 else rate / 2) * (1 + len(sizes) % 2)
        now[0] += taken
        return taken

    monkeypatch.setattr(hardware, "_once", once)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    found = measure(torch.device("cpu"), dtype=torch.float32, seconds=0.2, largest=512)
    assert max(sizes) == (512 if rate > 1e9 else 256)  # a slow device is not asked for products that take too long
    assert found == pytest.approx(rate if rate > 1e9 else rate / 2)
    assert now[0] < (0.25 if rate > 1e9 else 0.7)
    assert len(sizes) >= 5


def test_the_cpu_is_measured() -> None:
    found = peak(torch.device("cpu"), precision="fp32")
    assert found.meaning == MEASURED != DATASHEET
    assert found.flops > 1e6
