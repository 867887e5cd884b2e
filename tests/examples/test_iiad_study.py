"""The study's phases: they run in spite of failed trials, which the error at the end names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import iiad_study as study
import pytest
from rich.console import Console
from sample_trials import sample_trial
from small_size import SMALL

from iiet.cost import training_flops_per_token
from orchestrator import SweepModel
from orchestrator.cli.session import Session
from orchestrator.pipelines.training import pretraining_job
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import Settings, read_settings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.schedules import schedule_by_step
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import open_workspace
from orchestrator.workspace.provenance import content_key

CHOICES = study.Choices(seeds=(0,), two_stage_from=0.75)
FAILING = {"vanilla, rate 0.004", "pcformer"}


def results_of(models: Sequence[SweepModel], job: Callable[[Settings], TrainingJob]) -> list[Trial]:
    """Make up a result of each model: a higher learning rate gives a higher loss."""
    results = []
    for model in models:
        config = job(model.settings).model
        training = model.settings.training
        results.append(
            sample_trial(
                key=content_key(model.label, training.model_dump(mode="json")),
                role="trial" if config.corrections.num_corrections else "baseline",
                method=config.method,
                schedule=tuple(config.corrections or ()),
                label=model.label,
                seed=training.seed if model.group else None,
                group=model.group,
                quality={"accuracy": 0.5, "validation_loss": training.learning_rate},
                train={"flops": 1.0, "tokens": 1.0},
                cost={"evaluations": 2.0},
                checkpoint=f"/{model.label}",
            )
        )
    return [result for result in results if result.label not in FAILING]


def results_of_students() -> list[Trial]:
    common: dict[str, Any] = {"method": "iiet", "quality": {"accuracy": 0.5}}
    common["quality"]["validation_loss"] = 3.0
    full, none = {"evaluations": 4.0}, {"evaluations": 2.0}
    teacher = sample_trial(key="t", role="teacher", schedule=(1, 1), cost=full, **common)
    student = sample_trial(key="s", role="trial", schedule=(0, 0), cost=none, **common)
    return [teacher, student]


@pytest.fixture
def session(tmp_path: Path, tiny_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session whose sweeps return made-up results."""
    workspace = open_workspace(tmp_path / "space")

    def sweep(settings: Settings, **options: Any) -> SimpleNamespace:
        if settings.sweep.kind == "threshold":
            return SimpleNamespace(trials=results_of_students(), failures={}, shown=list)
        models = options["models"]
        failures = {model.label: "boom" for model in models if model.label in FAILING}
        trials = results_of(models, lambda own: pretraining_job(own, workspace, tiny_tokens))
        return SimpleNamespace(trials=trials, failures=failures, shown=list)

    monkeypatch.setattr(study, "prepare", lambda *_, **__: tiny_tokens)
    monkeypatch.setattr(study, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(study, "sweep", sweep)
    monkeypatch.setattr(study, "report", lambda **_: SimpleNamespace(folder=tmp_path))
    return Session(workspace, Progress(), Console(file=StringIO()), StringIO(), StringIO())


@pytest.fixture
def settings() -> Settings:
    return resolve_settings(
        {},
        [
            "sweep={methods: [vanilla, pcformer, iiet], iterations: [0, 1]}",
            "sweep.learning_rates={vanilla: [2.0e-3, 4.0e-3]}",
            "model.num_layers=2",
        ],
    )


def test_a_study_continues_after_failed_trials_and_names_them_at_the_end(
    session: Session, settings: Settings
) -> None:
    with pytest.raises(RunFailed, match="2 trials failed") as failed:
        study.run_study(settings, CHOICES, session)
    assert all(label in str(failed.value) for label in FAILING)
    text = (session.workspace.overlays / "study" / "results.md").read_text()
    assert "| vanilla | 2 |" in text, "at the rate that did not fail"
    assert "pcformer" not in text
    assert "r = 1 against vanilla at equal tokens: loss" in text
    assert "± 0.000" not in text, "one seed has no error"
    assert "keeps 100.0% of its teacher's accuracy" in text


def test_a_study_without_its_teacher_ends_there(
    session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_iiad_study.FAILING", {"r = 1", "r = 1, two stages"})
    with pytest.raises(RunFailed, match="r = 1"):
        study.run_study(settings, CHOICES, session)
    assert not (session.workspace.overlays / "study").exists()


@pytest.mark.parametrize("ramp", [0.0, 0.3])
def test_equal_flops_are_those_that_the_trainings_count(
    session: Session, settings: Settings, ramp: float
) -> None:
    recipe = {"num_steps": 1000, "iterate_from_fraction": 0.2, "iterate_ramp_fraction": ramp}
    training = settings.training.model_copy(update=recipe)
    sweep = settings.sweep.model_copy(update={"iterations": (0, 3)})
    settings = settings.model_copy(update={"training": training, "sweep": sweep})
    planned = study._Study(settings, CHOICES, session, "s")
    steps = planned._steps_of_equal_flops()
    totals, largest = {}, 0.0
    for name, contender in planned.contenders.items():
        own = contender.at(rate=1.0, seed=0, num_steps=steps[name])
        config = planned._job(own).model
        schedule_at = schedule_by_step(config.corrections, own.training)
        at_step = [training_flops_per_token(config, schedule_at(n)) for n in range(steps[name])]
        totals[name], largest = sum(at_step), max(largest, *at_step)
    assert steps["r = 3"] == 1000, "the costliest"
    assert totals == pytest.approx(dict.fromkeys(totals, totals["r = 3"]), abs=2 * largest)
    assert steps["vanilla"] > 2000


@pytest.mark.parametrize(
    ("changes", "choices", "words"),
    [
        ({}, {"seeds": (2, 2)}, "the same seed twice"),
        (
            {"iterate_ramp_fraction": 0.3, "iterate_from_fraction": 0.0},
            {"two_stage_from": 0.8},
            r"two_stage_from=0\.8 and training\.iterate_ramp_fraction=0\.3 add up to more",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    session: Session,
    settings: Settings,
    changes: dict[str, float],
    choices: dict[str, Any],
    words: str,
) -> None:
    training = settings.training.model_copy(update=changes)
    settings = settings.model_copy(update={"training": training})
    with pytest.raises(UserError, match=words):
        study.run_study(settings, study.Choices(**choices), session)


def test_a_study_without_corrections_is_refused(session: Session, settings: Settings) -> None:
    sweep = settings.sweep.model_copy(update={"methods": ("vanilla",)})
    with pytest.raises(UserError, match="a study needs an IIET with corrections"):
        study.run_study(settings.model_copy(update={"sweep": sweep}), CHOICES, session)


def test_a_mistake_on_its_command_line_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workspace", str(tmp_path), "--set", "training.num_step=3", "--dry-run"]
    assert study.main(arguments) == 2
    assert "did you mean training.num_steps?" in " ".join(capfd.readouterr().err.split())


def test_its_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = [f"--set={change}" for change in SMALL]
    assert study.main(["--workspace", str(tmp_path / "ws"), "--dry-run", *changes]) == 0
    assert "this is the first phase; then" in " ".join(capfd.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_example_runs_all_its_phases_and_trains_nothing_twice(
    tmp_path: Path, ray_session: None
) -> None:
    changes = [
        *SMALL, "sweep.iterations=[0, 1]", "sweep.learning_rates={vanilla: [2.0e-3, 4.0e-3]}",
        "sweep.methods=[vanilla, iiet]", "sweep.num_schedules=2",
        "training.iterate_from_fraction=0.5", "model.num_layers=2",
    ]  # fmt: skip
    choices = study.Choices(
        seeds=(0, 1), metrics=("cosine",), controls=("pruned",), selections=("knapsack",)
    )
    workspace = open_workspace(tmp_path)
    console = Console(file=StringIO(), width=140)
    session = Session(workspace, Progress(), console, StringIO(), StringIO())
    settings = read_settings(study.SETTINGS, changes)
    study.run_study(settings, choices, session, dry_run=True)
    assert "this is the first phase; then" in console.file.getvalue()  # type: ignore[attr-defined]
    study.run_study(settings, choices, session)
    text = (workspace.overlays / "study" / "results.md").read_text()
    for other in ("vanilla", "r = 0"):
        assert re.search(rf"r = 1 against {other} at equal tokens: loss \S+ ± ", text)
    assert "| NFE | cosine | pruned | knapsack |" in text
    made = {
        folder: len([*folder.glob("*/done.json")]) for folder in (workspace.runs, workspace.trials)
    }
    # Two rates of vanilla and two more models; their second seeds; vanilla and r = 0 for longer.
    assert made[workspace.runs] == 4 + 3 + 2
    # Full and none, distilled; pruned without training.
    assert made[workspace.trials] == 2
