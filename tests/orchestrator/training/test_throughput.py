"""Speed and memory in the journal are those of the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training import monitor as throughput_module
from orchestrator.training.checkpoint import Position
from orchestrator.training.devices import World
from orchestrator.training.monitor import ThroughputMeter
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal


def test_speed_counts_the_steps_since_the_last_call() -> None:
    position = Position(step=3, num_tokens=1000, flops=5e9, seconds=10.0)
    meter = ThroughputMeter(position, World(), "fp32")
    position.num_tokens, position.flops, position.seconds = 1600, 11e9, 12.0
    found = meter.measure(position)
    assert found["train/tokens_per_second"] == pytest.approx(300.0)
    assert found["train/gflops_per_second"] == pytest.approx(3.0)
    assert "train/mfu" not in found
    position.num_tokens, position.flops, position.seconds = 1700, 12e9, 12.5
    assert meter.measure(position)["train/tokens_per_second"] == pytest.approx(200.0)


def test_mfu_is_the_share_of_the_peak_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {"bytes": 9 * 10**9}  # Of the trial before.
    for name, answer in {
        "get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
        "reset_peak_memory_stats": lambda _: peak.update(bytes=3 * 10**9),
        "max_memory_allocated": lambda _: peak["bytes"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(throughput_module, "gpu_peak_flops", lambda name, precision: 1e15)
    monkeypatch.setattr(throughput_module, "gpu_loads", lambda _: loads)
    position = Position()
    world = World(size=4, device="cuda:0")
    loads = {"system/gpu_0_power_usage_watts": 350.0}
    meter = ThroughputMeter(position, world, "bf16")
    position.num_tokens, position.flops, position.seconds = 10, 8e15, 5.0
    found = meter.measure(position)
    assert found["train/mfu"] == pytest.approx(0.4)
    assert found["train/memory_gb"] == 3.0
    assert found["system/gpu_0_power_usage_watts"] == 350.0


def test_a_run_records_its_speed_memory_and_machine(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    job = TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model=tiny_model,
        recipe=TrainingSettings(num_steps=2, num_tokens_per_step=32, num_validation_tokens=32),
    )
    outcome = run_job(job)
    records = [r["values"] for r in read_journal(job.folder)[0] if "values" in r]
    steps = [values for values in records if "train/loss" in values]
    seconds = sum(32 / values["train/tokens_per_second"] for values in steps)
    assert seconds == pytest.approx(outcome.train_seconds)
    flops = sum(v["train/gflops_per_second"] * 32e9 / v["train/tokens_per_second"] for v in steps)
    assert flops == pytest.approx(outcome.training_flops)
    assert 0.01 < steps[-1]["train/memory_gb"] < psutil.virtual_memory().total / 1e9
    assert 0 < steps[-1]["system/system_memory_usage_percentage"] <= 100
