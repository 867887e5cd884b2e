"""Peak speeds: known GPUs by name, a CPU by measurement."""

from __future__ import annotations

from orchestrator.training.peak_flops import gpu_peak_flops, measure_cpu_flops


def test_peak_flops_of_known_gpus_and_of_the_cpu() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert gpu_peak_flops("GeForce", "bf16") is None
    speeds = measure_cpu_flops(count=3, seconds=0.005)
    assert len(speeds) == 3
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 1e8
