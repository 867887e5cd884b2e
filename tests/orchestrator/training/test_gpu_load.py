"""The GPUs of all workers have metrics by rank; what does not answer has none."""

from __future__ import annotations

import warnings

import pytest
import torch

from orchestrator.training import monitor
from orchestrator.training.devices import World
from orchestrator.training.monitor import SENSORS, gpu_loads


def test_every_rank_has_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(own: dict[str, float], world: World) -> list[dict[str, float]]:
        assert world.rank == 1
        return [{"power_usage_watts": 310.0, "utilization_percentage": 97.0}, own]

    monkeypatch.setattr(monitor, "gathered", gather)
    sensors = {"power_usage_watts": lambda device: 300.0 + device.index}
    found = gpu_loads(World(rank=1, size=2, device="cuda:5"), sensors=sensors)
    assert found == {
        "system/gpu_0_power_usage_watts": 310.0,
        "system/gpu_0_utilization_percentage": 97.0,
        "system/gpu_1_power_usage_watts": 305.0,
    }


def test_a_sensor_that_fails_has_no_metric_and_no_warning() -> None:
    def broken(device: torch.device) -> float:
        raise RuntimeError("Not Supported")

    sensors = {"utilization_percentage": broken, "power_usage_watts": lambda _: 70.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gpu_loads(World(device="cuda:0"), sensors=sensors)
    assert found == {"system/gpu_0_power_usage_watts": 70.0}


def test_there_is_none_on_cpus() -> None:
    assert gpu_loads(World()) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_driver_nothing_is_measured() -> None:
    assert gpu_loads(World(device="cuda:0")) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_answers() -> None:
    found = gpu_loads(World(device="cuda:0"))
    assert set(found) == {f"system/gpu_0_{name}" for name in SENSORS}
    assert 0 <= found["system/gpu_0_utilization_percentage"] <= 100
    assert found["system/gpu_0_power_usage_watts"] > 1
