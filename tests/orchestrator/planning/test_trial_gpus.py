"""Each trial gets the smallest number of GPUs on which all trials fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iiet.config import ModelConfig
from orchestrator.planning.fit import ResourceRequest, check_fit, request_of
from orchestrator.planning.resources import FreeBytes
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.records.training import TrainingJob
from orchestrator.settings import (
    Settings,
    TrainingSettings,
    read_settings,
    resolve_settings,
)
from orchestrator.settings.shipped import shipped_sweeps
from orchestrator.sweeping.model_plans import settings_of_model, swept_models, teacher_and_baselines
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU_BYTES
from orchestrator.workspace.errors import UserError


def job_of(
    config: ModelConfig, recipe: TrainingSettings, teacher: Path | None = None
) -> TrainingJob:
    """Return a job without tokens, for planning only."""
    return TrainingJob(
        run_folder="not/there",
        tokens_folder="not/there",
        model=config,
        recipe=recipe,
        teacher_folder=str(teacher) if teacher else None,
    )


def assigned(*assignments: str, jobs: tuple[TrainingJob, ...] = ()) -> tuple[int, int | None]:
    """Return the GPUs of a trial, and how many trials run at once."""
    settings = resolve_settings({}, assignments)
    requests = [request_of(job) for job in jobs]
    sweep = assign_trial_gpus(settings, requests, gpu_bytes=ASSUMED_GPU_BYTES).sweep
    return sweep.gpus_per_trial or 0, sweep.trials_at_once


def test_trials_share_the_gpus_of_the_run() -> None:
    assert assigned() == (0, None)
    assert assigned("cluster.num_workers=4") == (0, None)
    assert assigned("cluster.num_gpus=8") == (1, 8)
    assert assigned("cluster.num_gpus=8", "sweep.trials_at_once=3") == (1, 3)
    assert assigned("cluster.num_gpus=8", "sweep.gpus_per_trial=3") == (3, 2)
    assert assigned("cluster.num_gpus=8", "sweep.workers_per_trial=4") == (4, 2)
    assert assigned("sweep.gpus_per_trial=2") == (2, None), "of a run on CPUs, as many as there are"


def test_a_trial_gets_the_smallest_number_of_gpus_on_which_it_fits() -> None:
    settings = resolve_settings({}, ["model.preset=340m", "model.corrections=3"])
    config = build_model_config(settings.model, vocab_size=32_000)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=16 * 2048, precision="bf16")
    # All sequences of a worker go through one pass: 16 on one GPU, 8 on each of two, 4, 2.
    free = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None)
    for number in (1, 2):
        with pytest.raises(UserError, match="would take about"):
            check_fit(
                ResourceRequest(config=config, recipe=recipe, num_workers=number, on_gpus=True),
                free,
            )
    check_fit(ResourceRequest(config=config, recipe=recipe, num_workers=4, on_gpus=True), free)
    jobs = (job_of(config, recipe),)
    # Three cannot share 16 sequences evenly.
    assert assigned("cluster.num_gpus=8", jobs=jobs) == (4, 2)
    assert assigned("cluster.num_gpus=2", jobs=jobs) == (2, 1), "what does not fit is refused later"


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["sweep.gpus_per_trial=0"], r"sweep\.gpus_per_trial=0 .* cluster\.num_gpus=8 names GPUs"),
        (["sweep.gpus_per_trial=9"], "asks for 9 GPUs"),
        (["sweep.workers_per_trial=16"], "asks for 16 GPUs"),
    ],
)
def test_trials_never_use_cpus_if_the_settings_name_gpus(
    assignments: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        assigned("cluster.num_gpus=8", *assignments)


def models_to_train(settings: Settings, teacher: Path) -> dict[str, list[TrainingJob]]:
    """Return what a sweep file trains: by the run itself, and in trials."""

    def config(own: Settings) -> ModelConfig:
        return build_model_config(own.model, vocab_size=32_000)

    if settings.sweep.kind == "iterations":
        models = [settings_of_model(settings, **changes) for _, changes in swept_models(settings)]
        return {"trials": [job_of(config(own), own.training) for own in models]}
    own = teacher_and_baselines(settings).values()
    full = config(settings)
    (teacher / "config.json").write_text(json.dumps(full.to_dict()))
    # The costliest student makes all corrections, beside its teacher.
    return {
        "run": [job_of(config(each), each.training) for each in own],
        "trials": [job_of(full, settings.distillation.training, teacher)],
    }


@pytest.mark.parametrize("name", shipped_sweeps())
def test_a_shipped_sweep_fits_on_the_devices_it_names(name: str, tmp_path: Path) -> None:
    settings = read_settings(shipped_sweeps()[name], [])
    on_gpus = settings.cluster.num_gpus > 0
    assert on_gpus == name.startswith("paper-")
    jobs = models_to_train(settings, tmp_path)
    sweep = assign_trial_gpus(settings, [request_of(job) for job in jobs["trials"]]).sweep
    assert sweep.gpus_per_trial == int(on_gpus), "each trial fits on one GPU"
    assert sweep.trials_at_once == (settings.cluster.num_gpus if on_gpus else None)
    if on_gpus:
        free = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None)
        for job in [*jobs["run"], *jobs["trials"]]:
            teacher = job.model if job.teacher_folder else None
            request = ResourceRequest(
                config=job.model, recipe=job.recipe, on_gpus=True, teacher=teacher
            )
            check_fit(request, free)
