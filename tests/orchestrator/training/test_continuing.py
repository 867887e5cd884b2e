"""A run that continues a finished one gives bitwise the result of training all steps again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from refusals import refused
from same_run import curve, events, same_run, steps_of, stop_at

from orchestrator.models.folder import TRAINING_STATE
from orchestrator.records.training import TrainingJob
from orchestrator.training.continuing import continue_job, continued_recipe
from orchestrator.training.run_locks import describe_saved_state
from orchestrator.training.schedules import learning_rate_at
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import find_checkpoints

MakeJob = Callable[..., TrainingJob]

SHORT: dict[str, Any] = {
    "num_steps": 20, "learning_rate": 1e-2, "warmup_steps": 3, "validate_every_steps": 5,
    "checkpoint_every_steps": 6, "num_checkpoints_kept": 1, "decay": "wsd", "decay_fraction": 0.25,
    "iterate_from_fraction": 0.6,
}  # fmt: skip
# More tokens than there are: the data order goes on into a second epoch.
LONG = {"num_steps": 60}


@pytest.fixture
def make(tiny_job) -> MakeJob:
    return lambda name, **recipe: tiny_job(name, **{**SHORT, **recipe})


def longer(earlier: TrainingJob, make: MakeJob, **changes: Any) -> TrainingJob:
    """Return the job that continues a finished one, before its start is chosen."""
    requested = make("long", **{**earlier.recipe.model_dump(), **LONG, **changes})
    recipe = continued_recipe(earlier.recipe, requested.recipe)
    return requested.model_copy(update={"recipe": recipe})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "start"),
    [
        ({}, 15),
        ({"decay": "constant"}, 20),
        ({"iterate_from_fraction": 0.2, "iterate_ramp_fraction": 0.3}, 15),
        ({"decay_fraction": 1.0}, 3),
    ],
)
def test_a_continued_run_equals_one_longer_training(make, recipe, start):
    short = make("short", **recipe)
    notes = list[str]()
    short_outcome = run_job(short)
    before = {path: path.stat().st_mtime_ns for path in short.folder.rglob("*")}

    def interrupt_twice(job: TrainingJob) -> TrainingJob:
        """Continue `short`, interrupted on the way; once before a checkpoint of its own."""
        job = continue_job(short, job, notes.append)
        assert not run_job(job, should_stop=stop_at(0)).finished
        assert describe_saved_state({"long": job}) == f"saved at step {start}"
        assert describe_saved_state({"waiting": make("waiting")}) == "not started yet"
        assert run_job(job, should_stop=stop_at(9)).step == start + 9
        return job

    job = same_run(longer(short, make), interrupt_twice)
    assert f"short from step {start} of 60" in notes[0]
    share = curve(job, "train/flops")[start]
    assert run_job(job).shared_flops == share <= short_outcome.training_flops
    # The finished run is untouched.
    assert {path: path.stat().st_mtime_ns for path in short.folder.rglob("*")} == before


def test_a_constant_run_can_get_a_decay_and_be_continued_again(make):
    short = make("short", decay="constant", iterate_from_fraction=0.0, num_steps=8)
    run_job(short)
    assert steps_of(short) == [8]
    job = continue_job(short, longer(short, make, decay="wsd", num_steps=12), print)
    assert job.continued_from == str(short.folder / "step_00000008")
    run_job(job)
    assert steps_of(job) == [9, 12], "the checkpoint before the decay is kept"
    third_job = make("again", decay="wsd", num_steps=16, iterate_from_fraction=0.0)
    third_job = continue_job(job, third_job, print)
    assert third_job.continued_from == str(job.folder / "step_00000009")
    rates = [learning_rate_at(step, make("run").recipe) for step in range(20)]
    assert rates[3:16] == [rates[3]] * 13
    assert rates[16] < rates[15]


def test_a_run_is_continued_with_other_corrections_from_before_they_begin(make, tiny_model):
    recipe = {"decay": "constant", "checkpoint_every_steps": 2, "num_checkpoints_kept": 9}
    short = make("short", **recipe, num_steps=4, iterate_from_fraction=0.5)
    run_job(short)
    job = make("long", **recipe, num_steps=8, iterate_from_fraction=0.25)
    model = {**tiny_model, "schedule": [1, 0]}
    job = TrainingJob.model_validate({**dict(job), "model": model})
    continued = same_run(job, lambda alone: continue_job(short, alone, print))
    assert [event["step"] for event in events(continued, "resumed")] == [2]
    assert not events(continued, "started")


def test_what_cannot_be_continued_exactly_is_refused(make):
    short = make("short", num_steps=8)
    cosine = make("cosine", decay="cosine", num_steps=4)
    with refused(UserError, "--steps", "8"):
        longer(short, make, num_steps=8)
    for job in (short, cosine):
        run_job(job)
    continue_printing = partial(continue_job, note=print)
    with refused(UserError, "recipe.learning_rate", "0.01", "0.5"):
        continue_printing(short, longer(short, make, learning_rate=0.5))
    with refused(UserError, "step 3", "6, 8"):
        continue_printing(short, longer(short, make, iterate_from_fraction=0.05))
    with refused(UserError, "4 steps", "training.decay=wsd"):
        continue_printing(cosine, longer(cosine, make))
    for checkpoint in find_checkpoints(short.folder):
        (checkpoint / TRAINING_STATE).write_bytes(b"")
    with refused(UserError, "step_00000006", TRAINING_STATE):
        continue_printing(short, longer(short, make))
