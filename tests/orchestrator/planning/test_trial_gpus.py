"""Each trial gets the smallest number of GPUs on which all trials fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.settings import TrainingSettings, resolve_settings
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU_BYTES
from orchestrator.workspace.errors import UserError


def assigned(
    *assignments: str, trainings: tuple[PlannedTraining, ...] = ()
) -> tuple[float, int | None]:
    """Return the GPUs of a trial, and how many trials run at once."""
    settings = resolve_settings({}, assignments)
    sweep = assign_trial_gpus(settings, trainings, gpu_bytes=ASSUMED_GPU_BYTES).sweep
    return sweep.gpus_per_trial or 0, sweep.trials_at_once


def test_trials_share_the_gpus_of_the_run() -> None:
    assert assigned() == (0, None)
    assert assigned("cluster.num_workers=4") == (0, None)
    assert assigned("cluster.num_gpus=8") == (1, 8)
    assert assigned("cluster.num_gpus=8", "sweep.trials_at_once=3") == (1, 3)
    assert assigned("cluster.num_gpus=8", "sweep.gpus_per_trial=3") == (3, 2)
    assert assigned("cluster.num_gpus=8", "sweep.workers_per_trial=4") == (4, 2)
    assert assigned("cluster.num_gpus=2", "sweep.gpus_per_trial=0.25") == (0.25, 8)
    assert assigned("cluster.num_gpus=1", "sweep.gpus_per_trial=0.3") == (0.3, 3)
    assert assigned("sweep.gpus_per_trial=2") == (2, None), "of a run on CPUs, as many as there are"


@pytest.mark.parametrize("gpus", [1.5, 0.001])
def test_a_part_of_several_gpus_is_refused(gpus: float) -> None:
    with pytest.raises(UserError, match=f"{gpus} GPUs are neither whole GPUs nor a share of one"):
        assigned(f"sweep.gpus_per_trial={gpus}")


def test_a_trial_gets_the_smallest_number_of_gpus_on_which_it_fits() -> None:
    settings = resolve_settings({}, ["model.preset=340m", "model.corrections=3"])
    config = build_model_config(settings.model, vocab_size=32_000)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=32 * 2048, precision="bf16")
    training = PlannedTraining(config=config, recipe=recipe, on_gpus=True)
    # All sequences of a worker go through one pass: 32 on one GPU, 16 on each of two, 8, 4.
    needed = [replace(training, num_workers=number).worker_bytes for number in (1, 2, 4)]
    assert needed[1] > ASSUMED_GPU_BYTES >= needed[2]
    # Three cannot share 32 sequences evenly.
    assert assigned("cluster.num_gpus=8", trainings=(training,)) == (4, 2)
    assert assigned("cluster.num_gpus=2", trainings=(training,)) == (2, 1), "refused later"


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
