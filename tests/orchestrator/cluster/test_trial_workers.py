"""A trial of two workers makes the model that one worker makes, also through a stop or a death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_trials import in_folder, with_job

from orchestrator.cluster.asha_scheduler import AshaByModel
from orchestrator.cluster.messages import Message
from orchestrator.models.open import load_model
from orchestrator.records.trial import AshaTrial, SweepPlan, Trial
from orchestrator.settings import ClusterSettings, SweepSettings, resolve_settings
from orchestrator.sweeping.asha import asha_trials, record_early_stop, stored_early_stop
from orchestrator.training.job import job_key
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal

pytestmark = pytest.mark.slow


def parameters(trial: Trial, asha: AshaTrial | None) -> dict[str, Any]:
    shown = asha.model_dump(mode="json") if asha else None
    return {"trial": trial.model_dump(mode="json"), "asha": shown}


def shared(trial: Trial, tmp_path: Path, *, num_steps: int = 12) -> Trial:
    """Return a trial whose batch two workers can share, and the validation of which is quick."""
    recipe = {"num_steps": num_steps, "checkpoint_every_steps": 10**6}
    return in_folder(with_job(trial, recipe), tmp_path / "trial")


def weights(checkpoint: str | None) -> dict[str, torch.Tensor]:
    return load_model(Path(str(checkpoint))).state_dict()


def run_with_two(
    trials: list[Trial],
    folder: Path,
    watch: Callable[[Any], None] | None = None,
    asha: Mapping[str, AshaTrial] | None = None,
    cluster: ClusterSettings | None = None,
) -> list[Any]:
    from orchestrator.cluster.ray_tune import TrialContext, TrialHooks, run_trials

    def trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        from orchestrator.sweeping import trial_run
        from orchestrator.sweeping.trial_queue import run_tune_trial

        trial_run.measure_trial = lambda trial, _: trial.with_numbers("quality", {"accuracy": 0.5})
        return run_tune_trial(parameters, context)

    sweep = SweepSettings(workers_per_trial=2, trials_at_once=5)
    asha = asha or {}
    given = {trial.key: parameters(trial, asha.get(trial.key)) for trial in trials}
    early_stops = Message()

    def stop_early(key: str, step: int, loss: float) -> None:
        record_early_stop(asha, key, step, loss)
        early_stops.part(key).post()

    reports = run_trials(
        trial,
        given,
        folder,
        sweep,
        cluster=cluster,
        scheduler=AshaByModel(asha, stop_early),
        early_stops=early_stops,
        hooks=TrialHooks(watch=watch or (lambda _: None)),
    )
    return [reports[key] for key in given]


@pytest.mark.long
def test_two_workers_make_what_one_makes_also_through_a_stop(
    tiny_plan: SweepPlan, ray_session: None, tmp_path: Path
) -> None:
    from orchestrator.workspace.errors import Interrupted

    trial = shared(tiny_plan.trials[1], tmp_path, num_steps=300)
    assert trial.job is not None
    folder = Path(trial.folder)
    pressed: list[int] = []

    def press(_: Any) -> None:
        steps = [r["step"] for r in read_journal(folder)[0] if r["kind"] == "metrics"]
        if steps and not pressed:
            pressed.append(steps[-1])
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_with_two([trial], tmp_path / "first", press)
    give_up = time.monotonic() + 20
    while not (saved := list(folder.glob("step_*"))):
        assert time.monotonic() < give_up, "the workers did not save their state"
    step = int(saved[0].name.removeprefix("step_"))
    assert 0 < step < 300

    fsdp = ClusterSettings(num_workers=4, parallel="fsdp", num_shards=4)
    [report] = run_with_two([trial], tmp_path / "second", cluster=fsdp)
    assert report.result == {"state": "made"}, report.error
    result = trial.result()
    assert result is not None
    events = [r for r in read_journal(folder)[0] if r["kind"] == "event"]
    resumed = next(r for r in events if r["name"] == "resumed")
    assert (resumed["num_workers"], resumed["step"]) == (2, step)
    assert (resumed["parallel"], resumed["num_shards"]) == ("fsdp", 2)

    job = trial.job.model_copy(update={"run_folder": str(tmp_path / "alone")})
    assert job_key(job) == job_key(trial.job)
    alone = weights(run_job(job).checkpoint)
    for name, tensor in weights(result.checkpoint).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.long
def test_a_worker_that_dies_is_tried_again_and_more_trials_than_places_all_end(
    tiny_plan: SweepPlan, ray_session: None, tmp_path: Path
) -> None:
    trials = [shared(tiny_plan.trials[n], tmp_path / str(n)) for n in (1, 2)]
    victim = with_job(trials[0], {"num_steps": 400, "checkpoint_every_steps": 20})
    killed: list[int] = []

    def kill_a_worker(_: Any) -> None:
        records, _ = read_journal(Path(victim.folder))
        if not killed and any(r.get("name") == "checkpoint" for r in records):
            killed.append(next(r["pid"] for r in records if r.get("name") == "started"))
            os.kill(killed[0], signal.SIGKILL)

    reports = run_with_two([victim, trials[1]], tmp_path / "sweep", kill_a_worker)
    assert killed
    assert [r.result for r in reports] == [{"state": "made"}] * 2, [r.error for r in reports]
    names = [r.get("name") for r in read_journal(Path(victim.folder))[0]]
    assert "resumed" in names, "it went on from its checkpoint"


@pytest.mark.long
def test_a_trial_that_asha_ends_saves_its_state_and_frees_its_workers(
    tiny_plan: SweepPlan, ray_session: None, tmp_path: Path
) -> None:
    import ray

    trials = [
        in_folder(
            with_job(
                tiny_plan.trials[1],
                {"num_steps": steps, "learning_rate": rate, "validate_every_steps": 20},
            ),
            tmp_path / name, key=name, label=name,
        )
        for name, rate, steps in (("good", 1e-2, 400), ("bad", 1e-7, 400))
    ]  # fmt: skip
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": tuple(trials)})
    asha = asha_trials(plan, resolve_settings({}, ["sweep.asha=true"]).sweep)
    good, bad = run_with_two(trials, tmp_path / "sweep", asha=asha)
    assert good.result == {"state": "made"}, good.error
    assert bad.result == {"state": "stopped early"}, bad.error
    stop = stored_early_stop(trials[1], asha["bad"])
    assert stop is not None
    assert stop.step in (100, 200)
    [saved] = Path(trials[1].folder).glob("step_*")
    assert stop.step <= int(saved.name.removeprefix("step_")) < 400
    give_up = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < give_up, "the workers keep their CPUs"
        time.sleep(0.2)
