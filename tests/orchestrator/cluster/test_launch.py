"""Where the work of a command runs that trains nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.cluster import gpu_task
from orchestrator.cluster.launch import command_device
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs; returns those that were made the current one."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def _device_of(folder: Path, **cluster: object) -> str:
    found = command_device(ClusterSettings(**cluster), folder)  # type: ignore[arg-type]
    return found(lambda device, _: device, Progress())


def test_the_device_of_the_settings_is_used_in_this_process(
    two_gpus: list[str], tmp_path: Path
) -> None:
    assert _device_of(tmp_path) == "cuda"
    assert _device_of(tmp_path, device="cuda:1") == "cuda:1"
    assert _device_of(tmp_path, device="cuda:1", num_gpus=2) == "cuda:1"
    assert two_gpus == ["cuda:1", "cuda:1"], "what allocates without a device uses it, too"


def test_the_cpu_wins_over_gpus_and_clusters(two_gpus: list[str], tmp_path: Path) -> None:
    assert _device_of(tmp_path, device="cpu", num_gpus=2) == "cpu"
    assert _device_of(tmp_path, device="cpu", address="10.0.0.1:6379") == "cpu"


def test_a_gpu_that_the_settings_reserve_is_a_task_of_ray(
    two_gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from orchestrator.cluster import start

    monkeypatch.setattr(start, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(gpu_task, "run_gpu_task", lambda *_, **__: "a task")
    assert _device_of(tmp_path, device="cuda", num_gpus=1) == "a task"
    assert _device_of(tmp_path, device="cuda", address="10.0.0.1:6379") == "a task"


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpus, device, words in (
        (0, "cuda", "no GPU that PyTorch"),
        (1, "cuda:1", "--device cuda:1: this machine has cuda:0"),
        (4, "cuda:4", "--device cuda:4: this machine has cuda:0, cuda:1, cuda:2, cuda:3"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=words):
            _device_of(tmp_path, device=device)
