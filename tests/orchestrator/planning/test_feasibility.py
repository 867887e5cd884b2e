"""Trainings that do not fit are refused before anything starts."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.pipelines import sweeps
from orchestrator.planning.feasibility import MeasureFree, check_trainings, check_trials_fit
from orchestrator.planning.fit import ResourceRequest
from orchestrator.planning.resources import FreeBytes, Resources
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.settings import (
    ClusterSettings,
    SweepSettings,
    resolve_settings,
)
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import UserError


def measured(*, memory: float | None = None, disk: float | None = None) -> MeasureFree:
    """Return a stand-in for `local_free_bytes` that always finds the same."""
    free = FreeBytes(
        memory=None if memory is None else int(memory), disk=None if disk is None else int(disk)
    )
    return lambda *_, **__: free


def test_trials_that_do_not_fit_in_memory_together_are_refused(tiny_plan: SweepPlan) -> None:
    jobs = [trial.job for trial in tiny_plan.trials if trial.job]

    def check(gigabytes: float, sweep: SweepSettings) -> None:
        check_trials_fit(
            jobs,
            sweep,
            resources=Resources(cpus=8, gpus=0),
            measure_free=measured(memory=gigabytes * 2**30),
        )

    # Each takes little more memory than a process does.
    check(1.3, SweepSettings(trials_at_once=2))
    with pytest.raises(UserError, match=r"sweep\.trials_at_once=2"):
        check(1.3, SweepSettings())
    with pytest.raises(UserError, match="training would take"):
        check(0.1, SweepSettings())


def test_trainings_that_fit_on_the_disk_only_one_by_one_are_refused(tiny_plan: SweepPlan) -> None:
    jobs = [trial.job for trial in tiny_plan.trials if trial.job]
    assert len(jobs) == 4
    one = 12 * 10_146  # Bytes of a checkpoint.

    def check(num_checkpoints: float, *, teacher_bytes: int = 0, **recipe: int) -> None:
        measure_free = measured(disk=num_checkpoints * one)
        own = [
            job.model_copy(update={"recipe": job.recipe.model_copy(update=recipe)}) for job in jobs
        ]
        check_trials_fit(
            own, SweepSettings(), teacher_bytes=teacher_bytes, measure_free=measure_free
        )
        if not teacher_bytes:
            check_trainings(own, ClusterSettings(), measure_free=measure_free)

    check(4)
    with pytest.raises(
        UserError, match=r"4 trainings .* 475\.2 KiB together .* has 356\.7 KiB free"
    ):
        check(3)
    with pytest.raises(
        UserError, match=r"teacher cache 118\.9 KiB.*--set distillation\.teacher_cache=live"
    ):
        check(4.5, teacher_bytes=one)
    check(5, teacher_bytes=one)
    # Each keeps two, and each that runs at the same time writes one more.
    often = {"checkpoint_every_steps": 10, "num_checkpoints_kept": 2}
    check(8 + 4, **often)
    with pytest.raises(UserError, match=r"--set distillation\.training\.num_checkpoints_kept=1;"):
        check(8, **often)


def test_students_that_do_not_fit_are_refused_before_their_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher is trained")

    text = tmp_path / "text.jsonl"
    rows = [{"text": f"A sentence about {n} and its square {n * n}."} for n in range(300)]
    text.write_text("\n".join(map(json.dumps, rows)))
    settings = resolve_settings(
        {},
        [
            "data.source=files", f"data.files=[{text}]", "data.vocab_size=300",
            "model={num_layers: 2, dim: 16, num_heads: 2, ffn_dim: 32, context_length: 16}",
            "training={num_steps: 10, num_tokens_per_step: 64, num_validation_tokens: 64}",
            "distillation.training={num_steps: 10, num_tokens_per_step: 64}",
            "sweep.num_schedules=5",
        ],
    )  # fmt: skip
    monkeypatch.setattr(sweeps, "pretrain_models", never)
    monkeypatch.setattr(sweeps, "ray_cluster", lambda **_: nullcontext())
    config = build_model_config(settings.model, vocab_size=300)
    request = ResourceRequest(config=config, recipe=settings.training)
    checkpoint = request.estimate().checkpoint_bytes
    # Three models are pretrained, and at most five students follow.
    for num_checkpoints, error, words in (
        (8, AssertionError, "the teacher is trained"),
        (7.5, UserError, "8 trainings would write about"),
    ):
        usage = SimpleNamespace(free=int(num_checkpoints * checkpoint))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, found=usage: found)
        with pytest.raises(error, match=words):
            sweeps.sweep(settings, workspace=tmp_path / "ws")
