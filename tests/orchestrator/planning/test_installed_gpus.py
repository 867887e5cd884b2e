"""Names and free memory of GPUs come from NVML, for those that CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pynvml
import pytest

from orchestrator.planning.installed_gpus import InstalledGpu, driver_version, installed_gpus

FIRST, SECOND = "GPU-1a2b", "GPU-1a9c"
PART = "MIG-77"


class MachineWithTwoGpus:
    """Answers as the module `pynvml` would; a handle is the GPU's id."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.free_bytes = {FIRST: 10, SECOND: 20, PART: 5}
        self.users = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:  # noqa: N802
        return (FIRST, SECOND)[number]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.free_bytes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=self.free_bytes[handle], total=100)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [FIRST, SECOND]),
        ("1,0", [SECOND, FIRST]),
        ("1", [SECOND]),
        ("0,7,1", [FIRST]),
        ("", []),
        ("-1", []),
        (f"{SECOND},{FIRST}", [SECOND, FIRST]),
        ("GPU-1a9", [SECOND]),
        ("GPU-1a", []),
        (PART, [PART]),
        ("MIG-unknown", []),
    ],
)
def test_only_visible_gpus_count(
    visible: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = MachineWithTwoGpus()
    free = machine.free_bytes
    assert installed_gpus(machine) == [InstalledGpu(f"NVIDIA {gpu}", free[gpu]) for gpu in found]
    assert machine.users == 0


def test_a_machine_without_nvml_has_no_known_gpu() -> None:
    class WithoutDriver(MachineWithTwoGpus):
        def nvmlInit(self) -> None:  # noqa: N802
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    assert installed_gpus(WithoutDriver()) == []


def test_without_the_extra_gpu_no_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Importing it fails as if it were missing.
    assert installed_gpus() == []
    assert driver_version() is None
