"""Which GPUs have bfloat16, and where TF32 is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.models.open import load_model, use_tf32
from orchestrator.records.training import TrainingJob
from orchestrator.training.devices import check_precision, device_precision
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import DeviceError


def volta(device: torch.device) -> tuple[int, int]:
    return 7, 0


def hopper(device: torch.device) -> tuple[int, int]:
    return 9, 0


@pytest.fixture
def _float32_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_models_are_evaluated_in_bf16_on_gpus_that_have_it() -> None:
    assert device_precision("cpu") == "fp32"
    assert device_precision("cuda:1", hopper) == "bf16"
    assert device_precision("cuda", volta) == "fp32"


def test_bf16_is_refused_on_a_gpu_that_would_emulate_it() -> None:
    check_precision("bf16", "cpu", section="training")
    check_precision("fp32", "cuda", section="training", capability=volta)
    check_precision("bf16", "cuda", section="training", capability=hopper)
    with pytest.raises(DeviceError, match=r"cuda:3 .* 7\.0.* --set training\.precision=fp32"):
        check_precision("bf16", "cuda:3", section="training", capability=volta)


@pytest.mark.usefixtures("_float32_products")
def test_tf32_is_for_gpus_only(tiny_job: Callable[..., TrainingJob]) -> None:
    outcome = run_job(tiny_job(num_steps=1))
    load_model(Path(str(outcome.checkpoint)))
    assert torch.get_float32_matmul_precision() == "highest", "CPUs compute as before"
    use_tf32("cuda:1")
    assert torch.get_float32_matmul_precision() == "high"
