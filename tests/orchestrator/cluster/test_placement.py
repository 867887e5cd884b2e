"""Trials get all of their workers' places or none, and share the CPUs evenly."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.cluster.placement import Room, TrialLimits, check_trial_size, find_room
from orchestrator.planning.resources import Resources
from orchestrator.workspace.errors import UserError


def room(cpus: int, gpus: int = 0, num_trials: int = 100, **limits: int) -> Room:
    return find_room(TrialLimits(**limits), num_trials, Resources(cpus, gpus))


def test_what_runs_together_has_room_in_full() -> None:
    for cpus, workers, trials in itertools.product(range(1, 17), range(1, 5), range(1, 6)):
        if workers <= cpus:
            found = room(cpus, num_trials=trials, workers_per_trial=workers)
            taken = found.at_once * found.workers * found.cpus
            assert taken <= cpus, "nobody waits for a place that another holds"
            assert found.at_once == min(trials, cpus // workers), "and none is left to wait"
            assert cpus - taken < found.at_once * found.workers, "no thread could be given to all"


def test_examples() -> None:
    assert room(2) == Room(at_once=2, workers=1, cpus=1, use_gpu=False)
    assert room(2, workers_per_trial=2) == Room(at_once=1, workers=2, cpus=1, use_gpu=False)
    assert room(8, workers_per_trial=2, at_once=2).cpus == 2
    assert room(16, 4, gpus_per_trial=2) == Room(at_once=2, workers=2, cpus=4, use_gpu=True)
    assert room(8, at_once=50).at_once == 8, "more than there is room for is cut down"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"workers_per_trial": 3}, ["3 workers", "--workers-per-trial 2"]),
        (
            {"gpus_per_trial": 1},
            ["--gpus-per-trial 1", "leave out --gpus-per-trial and set cluster.num_gpus=0"],
        ),
        ({"gpus_per_trial": 4, "workers_per_trial": 3}, ["--workers-per-trial 4"]),
    ],
)
def test_what_never_fits_says_what_would(limits: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_trial_size(TrialLimits(**limits), Resources(cpus=2, gpus=0))
    assert all(word in str(error.value) for word in words), error.value
