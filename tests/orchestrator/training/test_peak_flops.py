"""The peaks of GPUs are found by full names, so that no card gets the peak of another."""

from __future__ import annotations

import pytest

from orchestrator.training.monitor import ASSUMED_GPU, gpu_peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA B200", 2250, 1100),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100-PCIE-40GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
    ],
)
def test_peaks_by_full_name(name: str, bf16: float | None, fp32: float) -> None:
    assert gpu_peak_flops(name, "bf16") == (bf16 and bf16 * 1e12)
    assert gpu_peak_flops(name, "fp32") == fp32 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10G",
        "NVIDIA L40",
        "GeForce",
    ],
)
def test_a_card_of_the_same_family_does_not_get_the_peak_of_another(name: str) -> None:
    assert gpu_peak_flops(name, "bf16") is None


def test_the_assumed_gpu_is_the_sxm_module() -> None:
    assert gpu_peak_flops(ASSUMED_GPU, "bf16") == gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16")
