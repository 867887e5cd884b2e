"""The journal records the speed, load and memory of the steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import psutil
import pytest
import torch
from same_run import events, stop_at

from orchestrator.records.training import TrainingJob
from orchestrator.training import monitor
from orchestrator.training.checkpoint import Position
from orchestrator.training.monitor import STEPS_BEFORE, ThroughputMeter, gpu_loads
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World, gpu_peak_flops
from orchestrator.workspace.journal import read_journal

MakeJob = Callable[..., TrainingJob]


PEAKS: dict[str, tuple[float | None, float | None]] = {
    "NVIDIA H100 80GB HBM3": (989, 494),
    "NVIDIA H100 PCIe": (756, 378),
    "NVIDIA A100-SXM4-80GB": (312, 156),
    "NVIDIA A100 80GB PCIe": (312, 156),
    "NVIDIA GeForce RTX 4090": (165, 82.6),
    "Tesla V100-SXM2-16GB": (None, 15.7),
    # A card of the same family does not get the peak of another.
    "NVIDIA H100 NVL": (None, None),
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (None, None),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (None, None),
    "NVIDIA A10G": (None, None),
}


def test_peaks_are_found_by_full_name():
    for name, (bf16, fp32) in PEAKS.items():
        assert gpu_peak_flops(name, "bf16") == (bf16 and bf16 * 1e12)
        assert gpu_peak_flops(name, "fp32") == (fp32 and fp32 * 1e12)
    assert gpu_peak_flops("H100", "bf16") == 989e12


def test_the_gpus_of_all_workers_have_metrics_by_rank_and_what_fails_has_none(monkeypatch):
    def gather(gathered_loads: list[dict[str, float]], loads: dict[str, float]) -> None:
        gathered_loads[:] = [{"power_usage_watts": 310.0, "utilization_percentage": 97.0}, loads]

    def broken(device: torch.device) -> float:
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sensors = {"power_usage_watts": lambda d: 300.0 + d.index, "utilization_percentage": broken}
    monkeypatch.setattr(monitor, "SENSORS", sensors)
    assert gpu_loads(World(rank=1, size=2, device="cuda:5")) == {
        "system/gpu_0_power_usage_watts": 310.0,
        "system/gpu_0_utilization_percentage": 97.0,
        "system/gpu_1_power_usage_watts": 305.0,
    }
    assert gpu_loads(World()) == {}


def test_mfu_is_the_share_of_the_peak_of_all_gpus(monkeypatch):
    peak = {"bytes": 9 * 10**9}  # The process has the peak of the trial before.
    for name, answer in {
        "get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
        "reset_peak_memory_stats": lambda _: peak.update(bytes=3 * 10**9),
        "max_memory_allocated": lambda _: peak["bytes"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: None)
    monkeypatch.setattr(monitor, "SENSORS", {"power_usage_watts": lambda _: 350.0})
    position = Position()
    meter = ThroughputMeter(position, World(size=4, device="cuda:0"), "bf16")
    position.num_tokens = 10
    position.flops = 0.4 * 4 * 5.0 * PEAKS["NVIDIA H100 80GB HBM3"][0] * 1e12
    position.seconds = 5.0
    numbers = meter.measure(position)
    assert numbers["train/mfu"] == pytest.approx(0.4)
    assert numbers["train/memory_gb"] == 3.0
    assert numbers["system/gpu_0_power_usage_watts"] == 350.0


def test_a_run_records_its_speed_memory_and_machine(tiny_job):
    job = tiny_job(num_steps=2, num_tokens_per_step=32)
    outcome = run_job(job)
    records = [r["values"] for r in read_journal(job.folder)[0] if "values" in r]
    steps = [values for values in records if "train/loss" in values]
    seconds = sum(32 / values["train/tokens_per_second"] for values in steps)
    assert seconds == pytest.approx(outcome.train_seconds)
    flops = sum(v["train/gflops_per_second"] * 32e9 / v["train/tokens_per_second"] for v in steps)
    assert flops == pytest.approx(outcome.training_flops)
    assert 0.01 < steps[-1]["train/memory_gb"] < psutil.virtual_memory().total / 1e9
    assert 0 < steps[-1]["system/system_memory_usage_percentage"] <= 100


@pytest.mark.slow
def test_a_profile_holds_its_steps(tiny_job):
    profiled = tiny_job(num_steps=8, profile_steps=2)
    run_job(profiled)
    folder = profiled.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["memory.txt", "trace.json.gz"]
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{STEPS_BEFORE}", f"ProfilerStep#{STEPS_BEFORE + 1}"}
    assert any("Optimizer.step" in name for name in names)
    assert "aten::" in (folder / "memory.txt").read_text()
    assert [event["text"] for event in events(profiled, "profiled")] == ["profile of 2 steps"]

    # A run that ends early leaves a shorter profile, or none.
    job = tiny_job("early", num_steps=8, profile_steps=100)
    run_job(job, should_stop=stop_at(2))
    assert not (job.folder / "profile").exists()
    (event,) = events(job, "not profiled")
    assert "3 steps" in event["text"]
    run_job(job)
    assert [event["text"] for event in events(job, "profiled")] == ["profile of 3 steps"]
