"""A continued run equals bitwise one longer training; what cannot equal it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from iiet.weights import WEIGHTS
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.training.job import job_key
from orchestrator.training.schedules import learning_rate_at
from orchestrator.training.shared_steps import continue_job, continued_recipe, shared_steps
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import describe_saved_state
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints, step_of

SHORT: dict[str, Any] = {
    "num_steps": 20,
    "num_tokens_per_step": 64,
    "num_validation_tokens": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "validate_every_steps": 5,
    "checkpoint_every_steps": 6,
    "num_checkpoints_kept": 1,
    "decay": "wsd",
    "decay_fraction": 0.25,
    "iterate_from_fraction": 0.6,
}
# More tokens than there are: the data order goes on into a second epoch.
LONG = {"num_steps": 60}

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make(tiny_job: Callable[..., TrainingJob]) -> MakeJob:
    return lambda name, **recipe: tiny_job(name, **{**SHORT, **recipe})


def longer(earlier: TrainingJob, make: MakeJob, **changes: Any) -> TrainingJob:
    """Return the job that continues a finished one, before its start is chosen."""
    wanted = make("long", **{**earlier.recipe.model_dump(), **LONG, **changes})
    recipe = continued_recipe(earlier.recipe, wanted.recipe)
    return wanted.model_copy(update={"recipe": recipe})


def steps_of(job: TrainingJob) -> list[int]:
    return [step_of(folder) for folder in find_checkpoints(job.folder)]


def weights(outcome: TrainingOutcome) -> dict[str, Any]:
    return load_file(Path(str(outcome.checkpoint)) / WEIGHTS)


def recorded(job: TrainingJob, name: str) -> dict[int, float]:
    records, _ = read_journal(job.folder)
    return {r["step"]: r["values"][name] for r in records if name in r.get("values", {})}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "start"),
    [
        ({}, 15),
        ({"decay": "constant"}, 20),
        ({"iterate_from_fraction": 0.2, "iterate_ramp_fraction": 0.3}, 15),
        ({"iterate_from_fraction": 0.9}, 15),  # The decay begins before the corrections.
        ({"decay_fraction": 1.0}, 3),
        ({"spike_factor": 1e6}, 15),
    ],
)
def test_a_continued_run_equals_one_longer_training(
    make: MakeJob, recipe: dict[str, Any], start: int
) -> None:
    short = make("short", **recipe)
    first = run_job(short)
    before = {path: path.stat().st_mtime_ns for path in short.folder.rglob("*")}
    notes: list[str] = []
    job = continue_job(short, longer(short, make), notes.append)
    scratch = job.model_copy(
        update={"run_folder": f"{job.run_folder}-scratch", "continued_from": None}
    )
    assert job_key(job) == job_key(scratch)
    assert f"long continues short from step {start} of 60; the learning rate is" in notes[0]

    # It is interrupted on the way, once before it has a checkpoint of its own.
    asked = iter([True, *[False] * 9, True])
    assert not run_job(job, should_stop=lambda: next(asked)).finished
    assert describe_saved_state({"long": job}) == f"saved at step {start}"
    assert run_job(job, should_stop=lambda: next(asked)).step == start + 9
    outcome, expected = run_job(job), run_job(scratch)
    found, wanted = weights(outcome), weights(expected)
    assert all(equal(found[name], wanted[name]) for name in wanted)
    assert outcome.validation_loss == expected.validation_loss
    for name in ("train/loss", "validation/loss", "train/flops", "learning_rate"):
        assert recorded(job, name) == recorded(scratch, name)
    assert outcome.training_flops == expected.training_flops
    assert expected.shared_flops == 0.0
    share = recorded(job, "train/flops")[start]
    assert outcome.shared_flops == share <= first.training_flops
    # The finished run is untouched.
    assert {path: path.stat().st_mtime_ns for path in short.folder.rglob("*")} == before
    assert run_job(job) == outcome


def test_a_constant_run_can_get_a_decay_and_be_continued_again(make: MakeJob) -> None:
    short = make("short", decay="constant", iterate_from_fraction=0.0)
    run_job(short)
    job = continue_job(short, longer(short, make, decay="wsd", num_steps=32), print)
    assert job.continued_from == str(short.folder / "step_00000020")
    run_job(job)
    assert steps_of(job) == [24, 32]
    again = make("again", decay="wsd", num_steps=40, iterate_from_fraction=0.0)
    again = continue_job(job, again, print)
    assert again.continued_from == str(job.folder / "step_00000024")


def test_the_checkpoint_before_the_decay_is_kept(make: MakeJob) -> None:
    job = make("run")
    run_job(job)
    assert steps_of(job) == [15, 20]
    run_job(constant := make("constant", decay="constant"))
    assert steps_of(constant) == [20]
    rates = [learning_rate_at(step, job.recipe) for step in range(20)]
    assert rates[3:16] == [rates[3]] * 13
    assert rates[16] < rates[15]


def test_the_corrections_start_at_the_same_steps(make: MakeJob) -> None:
    short = make("short", iterate_from_fraction=0.35, iterate_ramp_fraction=0.3)
    job = longer(short, make, num_steps=47)
    assert job.recipe.iterate_from_fraction == 7 / 47
    assert shared_steps(short, job) == 16  # The decay's first step still has the peak rate.
    moved = longer(short, make, iterate_from_fraction=0.5)
    assert moved.recipe.iterate_from_fraction == 0.5
    assert shared_steps(short, moved) == 7


def test_what_cannot_be_continued_exactly_is_refused(make: MakeJob) -> None:
    short = make("short")
    with pytest.raises(UserError, match="--steps takes a larger number, got 20"):
        longer(short, make, num_steps=20)
    run_job(short)
    with pytest.raises(UserError, match=r"recipe\.learning_rate was 0\.01, is 0\.5"):
        continue_job(short, longer(short, make, learning_rate=0.5), print)
    moved = longer(short, make, iterate_from_fraction=0.05)
    with pytest.raises(UserError, match=r"differs from it after step 3.*only of the steps 15, 20"):
        continue_job(short, moved, print)
    cosine = make("cosine", decay="cosine")
    run_job(cosine)
    with pytest.raises(UserError, match=r"cosine over all of its 20 steps.* training\.decay=wsd"):
        continue_job(cosine, longer(cosine, make), print)
