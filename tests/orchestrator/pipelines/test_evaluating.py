"""An evaluation is run once for each task and model, and found again by its content alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_tracking import untracked
from lm_eval_tasks import logged_responses, write_choices
from one_evaluation import evaluate_model

from iiet.schedule import IterationSchedule
from orchestrator.evaluation import measuring
from orchestrator.evaluation import suite as loading
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.models.folder import load_config
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import ModelEvaluations
from orchestrator.pipelines.models import export
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.results import load_item_values
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.sweeping.plan import load_tasks, plan_suite
from orchestrator.sweeping.students import checkpoint_trial
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def checkpoint(tmp_path: Path, save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(tmp_path / "run", initializer_std=0.3)


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    write_choices(tmp_path / "tasks", "first", ["a b", "c d", "e f"])
    write_choices(tmp_path / "tasks", "second", ["g h", "i j"])
    return EvaluationSettings(suite="first, second", include_path=str(tmp_path / "tasks"))


class Lines(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.summary = ""
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: str) -> None:
        self.summary = summary


def evaluate(
    model: Path | OpenedModel,
    settings: EvaluationSettings,
    workspace: Workspace,
    *,
    schedule: IterationSchedule | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> EvaluationResult:
    subject = open_model(model, schedule) if isinstance(model, Path) else model
    context = untracked(workspace, progress)
    return evaluate_model(subject, settings, context, trust_remote_code=trust_remote_code)


def scores(workspace: Workspace) -> list[list[list[float]]]:
    """Return the stored log-likelihoods, different ones only."""
    found: list[list[list[float]]] = []
    for folder in workspace.evaluations.iterdir():
        for by_item in logged_responses(folder).values():
            found += [] if by_item in found else [by_item]
    return found


def test_each_task_is_run_once(
    checkpoint: Path, settings: EvaluationSettings, workspace: Workspace, runs: list[str]
) -> None:
    only_first = settings.model_copy(update={"suite": "first"})
    evaluate(checkpoint, only_first, workspace)
    fresh = evaluate(checkpoint, settings, workspace)
    lines = Lines()
    again = evaluate(checkpoint, settings, workspace, progress=lines)
    assert runs == ["first", "second"]
    assert again == fresh
    assert "5 items, found again" in lines.summary
    assert again.results["first"].values["acc"]
    assert len(list(workspace.evaluations.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_sweep_and_the_commands_after_it_share_what_was_measured(
    precision: str | None,
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    tiny_tokens: Path,
    runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings.model_copy(update={"precision": precision})
    config = load_config(checkpoint)
    suite = plan_suite(
        settings, tiny_tokens, config, load_tasks(settings, tiny_tokens, config, Progress())
    )
    cheaper = replace(config, schedule=IterationSchedule((1, 0)))
    measured = []
    for model in (config, cheaper):
        trial = checkpoint_trial("trial", "x", checkpoint, model, suite, workspace)
        result = run_trial(trial)
        assert result
        measured.append(result)
    assert runs == 2 * ["first", "second"]
    for model, result in zip((config, cheaper), measured, strict=True):
        found = evaluate(checkpoint, settings, workspace, schedule=model.corrections)
        quality = {f"quality/{name}": value for name, value in found.quality().items()}
        assert quality.items() <= result.numbers.items()
        assert load_item_values(workspace, [result]) == {result.key: found}
    folder = export(
        Settings(evaluation=settings), workspace=workspace, model=checkpoint, to=tmp_path / "out"
    )
    assert (
        f"| first | acc | {measured[0].numbers['quality/first/acc']:.4f} |"
        in (folder / "README.md").read_text()
    )
    # Another suite measures what is new, and the loss over held-out tokens is known.
    monkeypatch.setattr(measuring, "heldout_loss", pytest.fail)
    write_choices(tmp_path / "tasks", "third", ["k l"])
    wider = settings.model_copy(update={"suite": "first,second,third"})
    suite = plan_suite(
        wider, tiny_tokens, config, load_tasks(wider, tiny_tokens, config, Progress())
    )
    result = run_trial(checkpoint_trial("trial", "x", checkpoint, config, suite, workspace))
    assert result
    assert result.value(loss := "quality/validation_loss") == measured[0].numbers[loss]
    assert runs == [*2 * ["first", "second"], "third"]
    fewer = wider.model_copy(update={"suite": "third", "limit": 1})
    suite = plan_suite(
        fewer, tiny_tokens, config, load_tasks(fewer, tiny_tokens, config, Progress())
    )
    trial = checkpoint_trial("trial", "x", checkpoint, config, suite, workspace)
    assert run_trial(trial), "the limit is of tasks, and changes no loss"


def test_a_change_of_model_or_items_is_another_evaluation(
    checkpoint: Path, settings: EvaluationSettings, workspace: Workspace, runs: list[str]
) -> None:
    settings = settings.model_copy(update={"suite": "first"})
    full = evaluate(checkpoint, settings, workspace)
    evaluate(checkpoint, settings, workspace, schedule=IterationSchedule.none(2))
    same = evaluate(checkpoint, settings, workspace, schedule=IterationSchedule((2, 1)))
    assert runs == ["first"] * 2
    assert full == same
    assert len(scores(workspace)) == 2
    evaluate(checkpoint, settings.model_copy(update={"limit": 2}), workspace)
    write_choices(Path(settings.include_path or ""), "first", ["a b", "c d", "e k"])
    evaluate(checkpoint, settings, workspace)
    assert runs == ["first"] * 4


def test_precision_is_what_the_model_computes_in_and_part_of_the_key(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    runs: list[str],
) -> None:
    in_full = settings.model_copy(update={"suite": "first"})
    in_half = in_full.model_copy(update={"precision": "bf16"})
    full = evaluate(checkpoint, in_full, workspace).results["first"]
    half = evaluate(checkpoint, in_half, workspace).results["first"]
    assert runs == ["first"] * 2
    assert half.items == full.items
    rounded, exact = scores(workspace)
    assert rounded != exact
    for one, other in zip(rounded, exact, strict=True):
        assert one == pytest.approx(other, rel=0.02)
    for known in (in_full, in_half):
        evaluate(checkpoint, known, workspace)
    assert runs == ["first"] * 2


def test_an_interrupted_evaluation_keeps_the_tasks_that_were_done(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop_after_first(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    write = EvaluationStore.write
    monkeypatch.setattr(EvaluationStore, "write", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, settings, workspace)
    monkeypatch.setattr(EvaluationStore, "write", write)
    evaluate(checkpoint, settings, workspace)
    assert runs == ["first", "second"]


def test_what_the_hub_does_not_give_is_said(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "hub_problem", lambda: "it is far away")
    lines = Lines()
    both = settings.model_copy(update={"suite": "first,piqa"})
    found = evaluate(checkpoint, both, workspace, progress=lines)
    assert list(found.results) == ["first"]
    assert lines.notes == ["skipped piqa: it needs the hub, and it is far away"]
    assert "without piqa" in lines.summary


def test_a_task_that_is_missing_or_damaged_is_refused(
    checkpoint: Path, settings: EvaluationSettings, workspace: Workspace
) -> None:
    wrong = settings.model_copy(update={"suite": "first,secnd"})
    with pytest.raises(UserError, match=r"secnd: there is no such task; did you mean second\?"):
        evaluate(checkpoint, wrong, workspace)
    file = Path(str(settings.include_path)) / "second.yaml"
    file.write_text("task: [")
    with pytest.raises(UserError, match=str(file)):
        evaluate(checkpoint, settings, workspace)
    assert not list(workspace.evaluations.glob("*")), "nothing was measured"


def test_a_result_has_a_row_for_each_model_task_and_metric(
    checkpoint: Path, settings: EvaluationSettings, workspace: Workspace
) -> None:
    evaluation = evaluate(checkpoint, settings, workspace)
    table = ModelEvaluations(evaluations={"full": evaluation}).to_pandas()
    assert list(table.columns) == ["model", "task", "metric", "value", "stderr", "num_items"]
    row = table[(table["task"] == "first") & (table["metric"] == "acc")].iloc[0]
    assert row["value"] == evaluation.results["first"].metrics["acc"]
    assert not table["metric"].str.endswith("_stderr").any()


@pytest.mark.slow
def test_the_evaluation_is_a_run_with_its_quality(
    checkpoint: Path, settings: EvaluationSettings, workspace: Workspace
) -> None:
    import mlflow

    context = Context(workspace)
    for _ in range(2):
        found = evaluate_model(open_model(checkpoint), settings, context)
    client = mlflow.MlflowClient(workspace.tracking_uri)
    runs = client.search_runs([context.tracking.experiment_id])
    assert len(runs) == 1
    assert runs[0].data.tags["iiet.kind"] == "evaluation"
    assert runs[0].data.metrics["quality/accuracy"] == pytest.approx(found.accuracy)
    assert runs[0].data.params["schedule"] == "2,1"
    [read] = runs[0].inputs.dataset_inputs
    assert read.dataset.name == ", ".join(found.results)
    assert read.tags[0].value == "evaluation"


def test_held_out_tasks_need_the_tokens_of_the_checkpoint(
    checkpoint: Path, workspace: Workspace
) -> None:
    with pytest.raises(UserError, match="iiet-orch prepare"):
        evaluate(checkpoint, EvaluationSettings(), workspace)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (IterationSchedule((1, 1, 1)), "is for 3 layers"),
        (IterationSchedule((1,)), "is for 1 layers"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    schedule: IterationSchedule,
    complaint: str,
) -> None:
    with pytest.raises(UserError, match=complaint):
        evaluate(checkpoint, settings, workspace, schedule=schedule)


def test_no_checkpoint_is_the_users_mistake(
    tmp_path: Path, settings: EvaluationSettings, workspace: Workspace
) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(tmp_path, settings, workspace)
