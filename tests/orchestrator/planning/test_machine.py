"""CPUs, GPUs and memory of a machine: what fits, what is refused, and what is free."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from refusals import refused

from orchestrator.planning.machine import (
    InstalledGpu,
    Node,
    Resources,
    check_available,
    check_run_resources,
    free_memory,
    installed_gpus,
    local_resources,
    read_nvml,
)
from orchestrator.settings import ClusterSettings
from orchestrator.workspace.errors import UserError

TWO_CPUS = Resources((Node(2),))
TWO_GPUS = Resources((Node(16, 2),))


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "resources", "per_trial", "words"),
    [
        (1, 8, TWO_CPUS, False, ["2 CPUs and no GPU", "cluster.num_gpus=0", "cluster.address"]),
        (1, 8, TWO_GPUS, False, ["2 GPUs", "type --set cluster.num_gpus=2", "cluster.address"]),
        (3, 0, TWO_CPUS, False, ["num_workers=3", "type --set cluster.num_workers=2"]),
        (2, 0, Resources((Node(1),), "the cluster at x"), False, ["the cluster at x", "1 CPU,"]),
        (3, 0, TWO_CPUS, True, ["type --set sweep.workers_per_trial=2"]),
        (1, 8, TWO_GPUS, True, ["type --set sweep.gpus_per_trial=2"]),
        (1, 1, TWO_CPUS, True, ["leave sweep.gpus_per_trial out and set cluster.num_gpus=0"]),
        (100_000, 0, None, False, ["this machine"]),
    ],
)
def test_a_job_that_does_not_fit_is_refused_with_what_would(
    num_workers, num_gpus, resources, per_trial, words
):
    with pytest.raises(UserError) as caught:
        check_available(num_workers, num_gpus, resources, per_trial=per_trial)
    for word in words:
        assert word in str(caught.value)


def test_a_job_that_fits_passes_and_nothing_is_known_of_a_cluster_elsewhere():
    for num_workers, num_gpus, resources in (
        (1, 0, TWO_CPUS), (2, 0, TWO_CPUS), (1, 2, TWO_GPUS), (2, 2, TWO_GPUS), (4, 0, TWO_GPUS),
    ):  # fmt: skip
        check_available(num_workers, num_gpus, resources)
    check_available(1, 800, address="ray.example:6379")
    far = ClusterSettings(num_gpus=800, address="ray.example:6379")
    check_run_resources(far)
    with refused(UserError, "--local", "cluster.num_gpus=800"):
        check_run_resources(far, local=True)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="not on this system")
def test_a_process_has_the_cpus_that_it_may_use():
    assert 1 <= local_resources(count_gpus=False).cpus <= len(os.sched_getaffinity(0))


MIB = 2**20


def make_group(folder: Path, limit: str, used: int, inactive: int | None) -> Path:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    if inactive is not None:
        text = f"anon {5 * MIB}\ninactive_file {inactive}\nactive_file {7 * MIB}\n"
        (folder / "memory.stat").write_text(text)
    return folder


def test_cached_files_of_a_container_are_free_memory(tmp_path):
    limit = str(100 * MIB)
    full_of_files = make_group(tmp_path / "files", limit, 95 * MIB, 60 * MIB)
    assert free_memory([full_of_files]) == 65 * MIB
    assert free_memory([make_group(tmp_path / "x", limit, 95 * MIB, None)]) == 5 * MIB
    assert free_memory([make_group(tmp_path / "y", limit, 101 * MIB, 0)]) == 0
    # If a group is inside another one, the smaller limit counts.
    outer = make_group(tmp_path / "outer", limit, 90 * MIB, 0)
    assert free_memory([full_of_files, outer]) == 10 * MIB
    no_limit = make_group(tmp_path / "no limit", "max", 5 * MIB, 0)
    for groups in ([], [no_limit], [tmp_path / "nothing"], None):
        assert free_memory(groups) > 100 * MIB


FIRST = "GPU-1a2b"
SECOND = "GPU-1a9c"
PART = "MIG-77"


class MachineWithTwoGpus:
    """Answers as the module `pynvml` would; a handle is the GPU's id."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.free_bytes = {FIRST: 10, SECOND: 20, PART: 5}
        self.users = 0

        self.nvmlSystemGetDriverVersion = lambda: "570.1"
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetName = "NVIDIA {}".format

    def nvmlInit(self) -> None:  # noqa: N802
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:  # noqa: N802
        return self.nvmlDeviceGetHandleByUUID((FIRST, SECOND, *"?" * 9)[number])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.free_bytes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=self.free_bytes[handle], total=100)


@pytest.mark.parametrize(
    ("visible", "visible_gpus"),
    [
        (None, [FIRST, SECOND]),
        ("1,0", [SECOND, FIRST]),
        ("0,7,1", [FIRST]),
        ("", []),
        ("-1", []),
        (f"{SECOND}, {FIRST}", [SECOND, FIRST]),
        (PART, [PART]),
        ("MIG-unknown", []),
    ],
)
def test_only_visible_gpus_count(visible, visible_gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = MachineWithTwoGpus()
    expected = [InstalledGpu(f"NVIDIA {gpu}", machine.free_bytes[gpu]) for gpu in visible_gpus]
    assert installed_gpus(machine) == expected
    assert machine.users == 0


def test_without_a_driver_or_the_extra_gpu_no_gpu_is_known(monkeypatch):
    class WithoutDriver(MachineWithTwoGpus):
        def nvmlInit(self) -> None:  # noqa: N802
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    assert installed_gpus(WithoutDriver()) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Importing it fails as if it were missing.
    assert installed_gpus() == []
    assert read_nvml() == (None, [])
