"""Peak speeds of known GPUs."""

from __future__ import annotations

from orchestrator.training.peak_flops import gpu_peak_flops


def test_peak_flops_of_known_gpus() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert gpu_peak_flops("GeForce", "bf16") is None
