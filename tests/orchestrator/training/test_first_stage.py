"""A shared first stage gives bitwise the results of training it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from iiet.cost import training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.weights import WEIGHTS
from orchestrator.models.folder import weights_key
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import job_key
from orchestrator.training.shared_steps import FirstStage, first_stage_of, share_first_stages
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import PROVENANCE, checkpoint_name

RECIPE: dict[str, Any] = {
    "num_steps": 8,
    "num_tokens_per_step": 32,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "validate_every_steps": 2,
    "num_validation_tokens": 64,
    "checkpoint_every_steps": 100,
    "iterate_from_fraction": 0.75,
}
SWITCH = 6

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> MakeJob:
    def make(schedule: tuple[int, int], *, shares: bool = True, **recipe: Any) -> TrainingJob:
        name = f"{schedule}-{shares}-{recipe}"
        return TrainingJob(
            run_folder=str(tmp_path / "runs" / name),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": list(schedule)},
            recipe=TrainingSettings(**RECIPE | recipe),
            first_stages=str(tmp_path / "first_stages") if shares else None,
        )

    return make


def stage_of(job: TrainingJob) -> FirstStage:
    stage = first_stage_of(job)
    assert stage is not None
    return stage


def start_steps(job: TrainingJob) -> list[int]:
    """Return the step after which each process that trained a job started."""
    return [
        record.get("step", 0)
        for record in read_journal(job.folder)[0]
        if record.get("name") in ("started", "resumed")
    ]


def recorded(job: TrainingJob, name: str) -> dict[int, float]:
    return {
        record["step"]: record["values"][name]
        for record in read_journal(job.folder)[0]
        if name in record.get("values", {})
    }


def _is_last(steps: Iterator[int], last: int) -> bool:
    return next(steps) == last


def weights(outcome: TrainingOutcome) -> str:
    return weights_key(Path(str(outcome.checkpoint)))


@pytest.mark.parametrize("schedule", [(0, 0), (1, 1), (3, 0)])
def test_a_run_that_resumes_from_the_first_stage_equals_one_from_the_start(
    make_job: MakeJob, schedule: tuple[int, int]
) -> None:
    run_job(make_job((2, 1)))
    job, alone = make_job(schedule), make_job(schedule, shares=False)
    outcome, expected = run_job(job), run_job(alone)
    assert (start_steps(job), start_steps(alone)) == ([SWITCH], [0])
    assert weights(outcome) == weights(expected)
    assert outcome.validation_loss == expected.validation_loss
    assert outcome.training_flops == expected.training_flops
    assert outcome.num_tokens == expected.num_tokens
    for name in ("validation/loss", "train/loss", "train/flops"):
        assert recorded(job, name) == recorded(alone, name)
    assert set(recorded(job, "validation/loss")) == {2, 4, 6, 8}
    none = training_flops_per_token(job.model, IterationSchedule((0, 0)))
    assert outcome.shared_flops == pytest.approx(SWITCH * 32 * none)
    assert expected.shared_flops == 0.0
    assert run_job(job) == outcome


def test_a_model_without_corrections_can_store_the_first_stage(make_job: MakeJob) -> None:
    first, second = make_job((0, 0)), make_job((2, 1))
    run_job(first)
    run_job(second)
    assert (start_steps(first), start_steps(second)) == ([0], [SWITCH])


def test_a_ramp_begins_after_the_first_stage(make_job: MakeJob) -> None:
    run_job(make_job((2, 1)))
    job = make_job((2, 1), iterate_ramp_fraction=0.25)
    alone = make_job((2, 1), iterate_ramp_fraction=0.25, shares=False)
    assert weights(run_job(job)) == weights(run_job(alone))
    assert start_steps(job) == [SWITCH]


def test_stored_metrics_are_reported_and_can_stop_the_run(make_job: MakeJob) -> None:
    run_job(make_job((2, 1)))
    job = make_job((1, 1))
    reported: dict[int, float] = {}

    def report(step: int, numbers: Mapping[str, float]) -> None:
        if "validation/loss" in numbers:
            reported[step] = numbers["validation/loss"]

    stopped = run_job(job, report=report, should_stop=lambda: 4 in reported)
    made = recorded(make_job((2, 1)), "validation/loss")
    assert reported == {step: made[step] for step in (2, 4, 6)}
    assert (stopped.finished, stopped.step) == (False, SWITCH)
    again = run_job(job)
    assert again.finished
    assert weights(again) == weights(run_job(make_job((1, 1), shares=False)))


def test_only_a_run_before_the_end_of_the_stage_resumes_from_it(
    make_job: MakeJob,
) -> None:
    behind, ahead = make_job((1, 1)), make_job((0, 0))
    for job, last in ((behind, 2), (ahead, SWITCH + 1)):
        alone = job.model_copy(update={"first_stages": None})
        assert run_job(alone, should_stop=partial(_is_last, iter(range(100)), last)).step == last
    run_job(make_job((2, 1)))
    outcomes = [run_job(behind), run_job(ahead)]
    assert (start_steps(behind), start_steps(ahead)) == ([0, SWITCH], [0, SWITCH + 1])
    expected = [run_job(make_job(s, shares=False)) for s in ((1, 1), (0, 0))]
    assert [weights(one) for one in outcomes] == [weights(one) for one in expected]


def test_a_damaged_first_stage_is_reported_and_trained_again(make_job: MakeJob) -> None:
    run_job(make_job((2, 1)))
    job = make_job((1, 1))
    path = stage_of(job).checkpoint / WEIGHTS
    damaged = path.read_bytes()[:-1]
    path.unlink()  # A hard link: the run that stored it keeps its own.
    path.write_bytes(damaged)
    outcome = run_job(job)
    texts = [r["text"] for r in read_journal(job.folder)[0] if r.get("name") == "damaged"]
    assert len(texts) == 1
    assert texts[0].endswith("the first stage is trained again")
    assert start_steps(job) == [0]
    assert weights(outcome) == weights(run_job(make_job((1, 1), shares=False)))
    assert run_job(make_job((2, 1))).finished
    third = make_job((0, 0))
    run_job(third)
    assert start_steps(third) == [SWITCH], "the second run has stored it again"


def test_a_first_stage_without_provenance_is_damaged(make_job: MakeJob) -> None:
    run_job(make_job((2, 1)))
    stage = stage_of(make_job((1, 1)))
    (stage.checkpoint / PROVENANCE).unlink()
    warnings: list[str] = []
    assert stage.find(warnings.append) is None
    assert "trained again" in warnings[0]
    assert not list(stage.folder.parent.iterdir())


def test_a_full_disk_only_prevents_sharing(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FirstStage, checkpoint: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FirstStage, "store", refuse)
    job = make_job((2, 1))
    outcome = run_job(job)
    assert outcome.finished
    events = {r["name"]: r for r in read_journal(job.folder)[0] if r["kind"] == "event"}
    assert "No space left" in events["not shared"]["text"]


def test_an_interrupted_store_leaves_nothing(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job((2, 1))
    outcome = run_job(job.model_copy(update={"first_stages": None}))
    stage = stage_of(job)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orchestrator.training.shared_steps._link", refuse)
    with pytest.raises(OSError, match="No space left"):
        stage.store(Path(str(outcome.checkpoint)).with_name(checkpoint_name(8)))
    assert not list(stage.folder.parent.iterdir())


def test_only_models_with_the_same_first_stage_share_it(make_job: MakeJob) -> None:
    vanilla = make_job((0, 0))
    vanilla = vanilla.model_copy(
        update={
            "run_folder": f"{vanilla.run_folder}-vanilla",
            "model": replace(vanilla.model, method="vanilla"),
        }
    )
    jobs = [
        make_job((2, 1)),
        make_job((0, 0)),
        make_job((2, 1), learning_rate=2e-2),
        make_job((2, 1), seed=1),
        make_job((2, 1), num_validation_tokens=32),
        make_job((2, 1), iterate_from_fraction=0.5),
        make_job((1, 1), iterate_from_fraction=0.0),
        vanilla,
    ]
    common = share_first_stages(jobs)
    assert [bool(job.first_stages) for job in common] == [True, True, *[False] * 6]
    assert [job_key(job) for job in common] == [job_key(job) for job in jobs]
    assert stage_of(jobs[0]) == stage_of(jobs[1])
    assert len({stage_of(job).folder for job in jobs[:6]}) == 5
    assert not any(job.first_stages for job in share_first_stages([jobs[0], jobs[0]]))


def test_a_stored_first_stage_is_used_by_a_single_run(make_job: MakeJob) -> None:
    alone = make_job((1, 1))
    assert share_first_stages([alone])[0].first_stages is None
    run_job(make_job((2, 1)))
    assert share_first_stages([alone]) == [alone]
