"""Trials get CPUs or GPUs for all of their workers or none, and share the CPUs evenly."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.cluster.placement import Placement, trial_placement
from orchestrator.planning.resources import Resources
from orchestrator.settings import SweepSettings
from orchestrator.workspace.errors import UserError


def placement(cpus: int, gpus: int = 0, num_trials: int = 100, **sweep: int) -> Placement:
    return trial_placement(SweepSettings(**sweep), num_trials, Resources(cpus, gpus))


def test_all_workers_of_jobs_that_run_together_fit() -> None:
    for cpus, workers, trials in itertools.product(range(1, 17), range(1, 5), range(1, 6)):
        if workers <= cpus:
            found = placement(cpus, num_trials=trials, workers_per_trial=workers)
            taken = found.jobs_at_once * found.workers * found.cpus
            assert taken <= cpus, "nobody waits for a place that another holds"
            assert found.jobs_at_once == min(trials, cpus // workers), "and none is left to wait"
            assert cpus - taken < found.jobs_at_once * found.workers, "no thread is left for all"


def test_examples() -> None:
    assert placement(2) == Placement(jobs_at_once=2, workers=1, cpus=1, use_gpu=False)
    assert placement(2, workers_per_trial=2) == Placement(
        jobs_at_once=1, workers=2, cpus=1, use_gpu=False
    )
    assert placement(8, workers_per_trial=2, trials_at_once=2).cpus == 2
    assert placement(16, 4, gpus_per_trial=2) == Placement(
        jobs_at_once=2, workers=2, cpus=4, use_gpu=True
    )
    assert placement(8, trials_at_once=50).jobs_at_once == 8, "more than fit are cut down"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"workers_per_trial": 3}, ["3 workers", "--workers-per-trial 2"]),
        (
            {"gpus_per_trial": 1},
            ["--gpus-per-trial 1", "leave out --gpus-per-trial and set cluster.num_gpus=0"],
        ),
    ],
)
def test_what_never_fits_says_what_would(sweep: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        placement(2, **sweep)
    assert all(word in str(error.value) for word in words), error.value
