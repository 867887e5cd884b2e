"""Training in bfloat16 as on a GPU, here on the CPU: copies of the weights, cast once per step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.half_weights import HalfWeights
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training import optimizer
from orchestrator.training.precision import frozen_dtype
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import read_journal

RECIPE: dict[str, Any] = {
    "num_steps": 8,
    "num_tokens_per_step": 128,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every_steps": 4,
    "num_validation_tokens": 128,
    "iterate_from_fraction": 0.5,
    "precision": "bf16",
}

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> MakeJob:
    def make(name: str, **recipe: Any) -> TrainingJob:
        return TrainingJob(
            run_folder=str(tmp_path / name),
            tokens_folder=str(tiny_tokens),
            model=tiny_model,
            recipe=TrainingSettings(**{**RECIPE, **recipe}),
        )

    return make


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "HALF_WEIGHTS_ON", ("cpu",))


def losses(job: TrainingJob) -> list[float]:
    values = [record.get("values", {}) for record in read_journal(job.folder)[0]]
    return [v[name] for v in values for name in ("train/loss", "validation/loss") if name in v]


def trained(job: TrainingJob) -> list[float]:
    run_job(job)
    return losses(job)


def test_losses_are_close_to_those_of_autocast(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = trained(make_job("autocast"))
    monkeypatch.setattr(optimizer, "HALF_WEIGHTS_ON", ("cpu",))
    kept = trained(make_job("kept"))
    assert kept != cast
    assert kept == pytest.approx(cast, abs=0.02)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_stopped_and_resumed_run_is_bitwise_equal(make_job: MakeJob) -> None:
    whole = trained(make_job("whole"))
    calls = iter(range(100))
    run_job(make_job("cut"), should_stop=lambda: next(calls) == 5)
    assert trained(make_job("cut")) == whole


@pytest.mark.usefixtures("as_on_a_gpu")
def test_weights_are_cast_once_per_step_of_any_number_of_passes(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    casts: list[HalfWeights] = []
    refresh = HalfWeights.refresh

    def counted(self: HalfWeights) -> None:
        casts.append(self)
        refresh(self)

    monkeypatch.setattr(HalfWeights, "refresh", counted)
    single = trained(make_job("single"))
    assert len(casts) == 1 + RECIPE["num_steps"]
    parts = trained(make_job("parts", num_sequences_per_pass=2))
    assert len(casts) == 2 * (1 + RECIPE["num_steps"])
    assert parts == pytest.approx(single, abs=0.02)


def test_a_teacher_is_bfloat16_on_gpus_only() -> None:
    assert frozen_dtype("bf16", "cuda:1") == torch.bfloat16
    assert frozen_dtype("fp32", "cuda") == frozen_dtype("bf16", "cpu") == torch.float32
