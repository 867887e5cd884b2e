"""Steps that are taken over from another run give bitwise the result of training them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from refusals import refused
from same_run import curve, events, in_folder, same_run, steps_of, stop, stop_at

from iiet.cost import training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.weights import WEIGHTS
from orchestrator.models.folder import TRAINING_STATE
from orchestrator.records.training import TrainingJob
from orchestrator.training.job import job_key
from orchestrator.training.schedules import learning_rate_at
from orchestrator.training.shared_steps import (
    FirstStage,
    continue_job,
    continued_recipe,
    first_stage_of,
    share_first_stages,
)
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import describe_saved_state
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import PROVENANCE, find_checkpoints

MakeJob = Callable[..., TrainingJob]

STAGED = {
    "num_steps": 4, "num_tokens_per_step": 32, "learning_rate": 1e-2, "warmup_steps": 1,
    "validate_every_steps": 2, "checkpoint_every_steps": 100, "iterate_from_fraction": 0.5,
    "num_checkpoints_kept": 1,
}  # fmt: skip
SWITCH = 2


@pytest.fixture
def staged(tiny_job, tiny_model, tmp_path) -> MakeJob:
    """Make a job of a schedule that shares its first stage."""

    def make(schedule: tuple[int, int], name: str = "run", **recipe: Any) -> TrainingJob:
        job = tiny_job(name, **STAGED | recipe)
        model = {**tiny_model, "schedule": list(schedule)}
        return TrainingJob(**{**dict(job), "model": model, "first_stages": str(job.folder.parent)})

    return make


def stage_of(job: TrainingJob) -> FirstStage:
    stage = first_stage_of(job)
    assert stage is not None
    return stage


def starts(job: TrainingJob) -> list[int]:
    """Return the step after which each process that trained a job started."""
    return [0] * len(events(job, "started")) + [e["step"] for e in events(job, "resumed")]


def after_stage(of: TrainingJob) -> Callable[[TrainingJob], TrainingJob]:
    """Let the job share its first stage, which another one has trained."""

    def disturb(job: TrainingJob) -> TrainingJob:
        run_job(of)
        return job.model_copy(update={"first_stages": of.first_stages})

    return disturb


@pytest.mark.parametrize("schedule", [(0, 0), (3, 0)])
def test_a_run_that_continues_a_first_stage_equals_one_from_the_start(staged, schedule):
    job = staged(schedule).model_copy(update={"first_stages": None})
    continued = same_run(job, after_stage(staged((2, 1), "first")))
    assert starts(continued) == [SWITCH]
    assert set(curve(continued, "validation/loss")) == {2, 4}
    flops_per_token = training_flops_per_token(job.model, IterationSchedule((0, 0)))
    assert run_job(continued).shared_flops == pytest.approx(SWITCH * 32 * flops_per_token)
    assert run_job(in_folder(job, "run-alone")).shared_flops == 0.0
    if schedule == (0, 0):  # Such a job can store the stage, too; a ramp does not change it.
        (storing,) = share_first_stages([staged((2, 1), "again", iterate_ramp_fraction=0.25)])
        run_job(storing)
        assert starts(storing) == [SWITCH]


def test_only_a_run_before_the_end_of_the_stage_continues_it(staged):
    job = staged((1, 1)).model_copy(update={"first_stages": None})
    train_stage = after_stage(staged((2, 1), "first"))
    assert starts(same_run(job, stop(1), train_stage)) == [0, SWITCH]
    assert starts(same_run(job, stop(SWITCH + 1), train_stage)) == [0, SWITCH + 1]


@pytest.mark.parametrize("damaged_file", [WEIGHTS, TRAINING_STATE])
def test_a_damaged_first_stage_is_reported_and_trained_again(staged, damaged_file):
    def spoil(job: TrainingJob) -> TrainingJob:
        job = after_stage(staged((2, 1), "first"))(job)
        [checkpoint] = stage_of(job).checkpoints()
        path = checkpoint / damaged_file
        path.write_bytes(path.read_bytes()[:-1])
        return job

    job = same_run(staged((1, 1)).model_copy(update={"first_stages": None}), spoil)
    (event,) = events(job, "damaged")
    assert event["text"].endswith("or trained again")
    assert starts(job) == [0]
    run_job(third := staged((0, 0), "third"))
    assert starts(third) == [SWITCH], "the second run has trained it again"
    checkpoints = list(stage_of(third).checkpoints())
    assert [folder.parent.name for folder in checkpoints] == ["first", "run-0"]
    for folder in checkpoints:
        (folder / PROVENANCE).unlink()
    assert not stage_of(third).exists


def test_only_models_with_the_same_first_stage_share_it(staged):
    vanilla = staged((0, 0), "vanilla")
    jobs = [
        staged((2, 1), "1"),
        staged((0, 0), "2"),
        staged((2, 1), "3", learning_rate=2e-2),
        staged((2, 1), "4", seed=1),
        staged((2, 1), "5", num_validation_tokens=32),
        staged((2, 1), "6", iterate_from_fraction=0.25),
        staged((1, 1), "7", iterate_from_fraction=0.0),
        vanilla.model_copy(update={"model": replace(vanilla.model, method="vanilla")}),
    ]
    common = share_first_stages(jobs)
    assert [bool(job.first_stages) for job in common] == [True, True, *[False] * 6]
    assert [job_key(job) for job in common] == [job_key(job) for job in jobs]
    assert stage_of(jobs[0]).key == stage_of(jobs[1]).key
    assert len({stage_of(job).key for job in jobs[:6]}) == 5
    assert not any(job.first_stages for job in share_first_stages([jobs[0], jobs[0]]))
    # If only corrected layers are trained, schedules of different layers share no stage.
    frozen = [staged(schedule, trained_layers="corrected") for schedule in ((1, 0), (0, 1))]
    assert stage_of(frozen[0]).key != stage_of(frozen[1]).key


# Longer trainings

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


def test_a_run_is_continued_with_other_corrections_from_the_end_of_its_first_stage(staged):
    short = staged((2, 1), "short", decay="constant")
    run_job(short)
    longer = {"decay": "constant", "num_steps": 8, "iterate_from_fraction": 0.25}
    job = staged((1, 0), **longer).model_copy(update={"first_stages": None})
    continued = same_run(job, lambda alone: continue_job(short, alone, print))
    assert starts(continued) == [SWITCH]


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
