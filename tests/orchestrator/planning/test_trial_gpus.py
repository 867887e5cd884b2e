"""Trials get the GPUs that they need, and as many run at once as there are GPUs for."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.settings import TrainingSettings, resolve_settings

H100_BYTES = GPUS["H100"].free_bytes


def gpus_of_trial(
    *assignments: str, trainings: tuple[Estimate, ...] = ()
) -> tuple[float, int | None]:
    """Return the GPUs of a trial, and how many trials run at once."""
    settings = resolve_settings({}, assignments)
    sweep = assign_trial_gpus(settings, trainings, gpu_bytes=H100_BYTES).sweep
    return sweep.gpus_per_trial or 0, sweep.trials_at_once


def test_trials_share_the_gpus_of_the_run_and_get_as_many_as_they_need():
    for assignments, expected in {
        (): (0, None),
        ("cluster.num_workers=4",): (0, None),
        ("cluster.num_gpus=8",): (1, 8),
        ("cluster.num_gpus=8", "sweep.trials_at_once=3"): (1, 3),
        ("cluster.num_gpus=8", "sweep.gpus_per_trial=3"): (3, 2),
        ("cluster.num_gpus=8", "sweep.workers_per_trial=4"): (4, 2),
        ("cluster.num_gpus=2", "sweep.gpus_per_trial=0.25"): (0.25, 8),
        ("cluster.num_gpus=1", "sweep.gpus_per_trial=0.3"): (0.3, 3),
        ("sweep.gpus_per_trial=2",): (2, None),  # Of a run on CPUs, as many as there are.
    }.items():
        assert gpus_of_trial(*assignments) == expected
    settings = resolve_settings({}, ["model.preset=340m", "model.corrections=3"])
    config = settings.model.build(vocab_size=32_000)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=32 * 2048, precision="bf16")
    training = Estimate(config=config, recipe=recipe)
    # All sequences of a worker go through one pass: 32 on one GPU, 16 on each of two, 8, 4.
    needed = [
        replace(training, devices=Devices(num_workers=number, on_gpus=True)).worker_bytes
        for number in (1, 2, 4)
    ]
    assert needed[1] > H100_BYTES >= needed[2]
    # Three cannot share 32 sequences evenly.
    assert gpus_of_trial("cluster.num_gpus=8", trainings=(training,)) == (4, 2)
    assert gpus_of_trial("cluster.num_gpus=2", trainings=(training,)) == (2, 1), "refused later"


def test_a_named_gpu_decides_how_many_a_trial_needs():
    settings = resolve_settings({}, ["model.preset=340m", "model.corrections=3"])
    config = settings.model.build(vocab_size=32_000)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=32 * 2048, precision="bf16")
    training = Estimate(config=config, recipe=recipe)
    numbers = []
    for gpu in ("H200", "H100", "A100-40GB"):
        on_gpus = resolve_settings({}, ["cluster.num_gpus=32", f"cluster.gpu={gpu}"])
        numbers.append(assign_trial_gpus(on_gpus, [training]).sweep.gpus_per_trial)
    assert numbers == [2, 4, 8]
