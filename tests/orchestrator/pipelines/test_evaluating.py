"""An evaluation is run once for each task and model, and found again by its content alone; an
interrupted one resumes where it was, and ends with the same bits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tracking import untracked
from kept_progress import KeptProgress
from lm_eval_tasks import logged_responses, write_choices, write_task
from one_evaluation import evaluate_model as evaluate
from read_tokens import ReadTokens, noted_tokens
from refusals import refused

from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import JOB_KEY, load_config
from orchestrator.models.open import open_model
from orchestrator.pipelines.evaluating import (
    ModelEvaluations,
    plan_evaluate,
)
from orchestrator.pipelines.models import export
from orchestrator.records.evaluation import Suite
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP, TrackedRun
from orchestrator.reporting.results import load_item_values
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.sweeping.students import checkpoint_trial
from orchestrator.sweeping.suite import load_tasks, plan_suite
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def checkpoint(tmp_path, save_tiny) -> Path:
    return save_tiny(tmp_path / "run", initializer_std=0.3)


@pytest.fixture
def settings(tmp_path) -> EvaluationSettings:
    write_choices(tmp_path / "tasks", "first", ["a b", "c d", "e f"])
    write_choices(tmp_path / "tasks", "second", ["g h", "i j"])
    return EvaluationSettings(suite="first, second", include_path=str(tmp_path / "tasks"))


def scores(workspace: Workspace) -> list[list[list[float]]]:
    """Return the stored log-likelihoods, different ones only."""
    different_scores: list[list[list[float]]] = []
    for folder in workspace.evaluations.iterdir():
        for by_item in logged_responses(folder).values():
            different_scores += [] if by_item in different_scores else [by_item]
    return different_scores


def sequences_of(length: int, read: ReadTokens) -> int:
    """Return how many sequences of a length were read; items of tasks are shorter."""
    return sum(len(batch) for batch in read.others if batch.size(1) == length)


def test_each_task_is_run_once(checkpoint, settings, workspace, runs):
    evaluate(checkpoint, settings.model_copy(update={"suite": "first"}), workspace)
    fresh = evaluate(checkpoint, settings, workspace)
    lines = KeptProgress()
    assert evaluate(checkpoint, settings, workspace, progress=lines) == fresh
    assert runs == ["first", "second"]
    assert "5 items, found again" in lines.summaries[-1]
    assert len(list(workspace.evaluations.iterdir())) == 2
    # The table has a row for each model, task and metric.
    table = ModelEvaluations(evaluations={"full": fresh}, num_evaluations={"full": 4}).to_pandas()
    columns = ["model", "task", "metric", "value", "stderr", "num_items"]
    assert list(table.columns) == [*columns, "difference", "low", "high"]
    row = table[(table["task"] == "first") & (table["metric"] == "acc")].iloc[0]
    assert row["value"] == fresh.results["first"].metrics["acc"]
    assert not table["metric"].str.endswith("_stderr").any()


def test_a_model_of_a_running_sweep_is_logged_by_the_sweep_alone(settings, workspace, save_tiny):
    """MLflow takes the run that logs a model first for its source, and that is its training."""
    trained = save_tiny(workspace.runs / "teacher", provenance={JOB_KEY: "key of the job"})
    trial = save_tiny(workspace.trials / "trial", provenance={JOB_KEY: "another"})
    context = untracked(workspace)

    def is_of_sweep(checkpoint: Path, schedule: str | None = None) -> bool:
        model = open_model(checkpoint, schedule=schedule)
        evaluate(model, settings.model_copy(update={"suite": "first"}), context)
        model = context.tracking.published[-1].model
        assert model is not None
        return model.is_of_sweep

    assert is_of_sweep(trial)
    assert not is_of_sweep(trained)
    pretraining = TrackedRun(key="key of the job", kind=PRETRAIN_OF_SWEEP, name="teacher")
    pretraining.write(pretraining.path(workspace))
    assert is_of_sweep(trained)
    assert not is_of_sweep(trained, schedule="0"), "the sweep shows it under its own schedule"


def test_results_of_each_sequence_length_are_stored_apart(checkpoint, settings, workspace, runs):
    context_length = load_config(checkpoint).context_length
    for length in (None, context_length, 4, 4):
        evaluate(checkpoint, settings.model_copy(update={"sequence_length": length}), workspace)
    assert runs == 2 * ["first", "second"]
    too_long = settings.model_copy(update={"sequence_length": context_length + 1})
    with pytest.raises(UserError, match=r"evaluation\.sequence_length=17"):
        evaluate(checkpoint, too_long, workspace)


@pytest.mark.slow
def test_a_sweep_and_the_commands_after_it_share_what_was_measured(
    checkpoint, settings, workspace, tiny_tokens, runs, tmp_path
):
    settings = settings.model_copy(update={"precision": "bf16"})
    config = load_config(checkpoint)

    def suite_of(settings: EvaluationSettings) -> Suite:
        fingerprints = load_tasks(settings, tiny_tokens, config, Progress())
        return plan_suite(settings, tiny_tokens, config, fingerprints)

    suite = suite_of(settings)
    cheaper = replace(config, schedule=IterationSchedule((1, 0)))
    measured = []
    for model in (config, cheaper):
        trial = checkpoint_trial("trial", "x", checkpoint, model, suite, workspace)
        result = run_trial(trial)
        assert result
        measured.append(result)
    assert runs == 2 * ["first", "second"]
    for model, result in zip((config, cheaper), measured, strict=True):
        evaluation = evaluate(checkpoint, settings, workspace, schedule=model.corrections)
        quality = {f"quality/{name}": value for name, value in evaluation.quality().items()}
        assert quality.items() <= result.numbers.items()
        assert load_item_values(workspace, [result]) == {result.key: evaluation}
    folder = export(
        checkpoint, workspace=workspace, settings=Settings(evaluation=settings), to=tmp_path / "out"
    )
    assert (
        f"| first | acc | {measured[0].numbers['quality/first/acc']:.4f} |"
        in (folder / "README.md").read_text()
    )
    # Another suite measures what is new, and the loss over held-out tokens is known.
    write_choices(tmp_path / "tasks", "third", ["k l"])
    wider = settings.model_copy(update={"suite": "first,second,third"})
    trial = checkpoint_trial("trial", "x", checkpoint, config, suite_of(wider), workspace)
    with noted_tokens() as read:
        result = run_trial(trial)
    assert result
    assert sequences_of(config.context_length, read) == 0
    assert result.value(loss := "quality/validation_loss") == measured[0].numbers[loss]
    assert runs == [*2 * ["first", "second"], "third"]
    fewer = wider.model_copy(update={"suite": "third", "limit": 1})
    trial = checkpoint_trial("trial", "x", checkpoint, config, suite_of(fewer), workspace)
    with noted_tokens() as read:
        assert run_trial(trial)
    assert sequences_of(config.context_length, read) == 1, "one item, and one sequence"


def test_a_change_of_model_items_or_precision_is_another_evaluation(
    checkpoint, settings, workspace, runs
):
    settings = settings.model_copy(update={"suite": "first"})
    full = evaluate(checkpoint, settings, workspace)
    assert evaluate(checkpoint, settings, workspace, schedule=IterationSchedule((2, 1))) == full
    in_half = settings.model_copy(update={"precision": "bf16"})
    half = evaluate(checkpoint, in_half, workspace)
    assert half.results["first"].items == full.results["first"].items
    rounded, exact = scores(workspace)
    assert rounded != exact
    for rounded_scores, exact_scores in zip(rounded, exact, strict=True):
        assert rounded_scores == pytest.approx(exact_scores, rel=0.02)
    evaluate(checkpoint, in_half, workspace)
    assert runs == ["first"] * 2
    evaluate(checkpoint, settings, workspace, schedule=IterationSchedule.none(2))
    evaluate(checkpoint, settings.model_copy(update={"limit": 2}), workspace)
    write_choices(Path(settings.include_path or ""), "first", ["a b", "c d", "e k"])
    evaluate(checkpoint, settings, workspace)
    assert runs == ["first"] * 5


def test_what_the_hub_does_not_give_is_said(checkpoint, settings, workspace, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = KeptProgress()
    with_piqa = settings.model_copy(update={"suite": "first,piqa"})
    evaluation = evaluate(checkpoint, with_piqa, workspace, progress=lines)
    assert list(evaluation.results) == ["first"]
    assert ["piqa" in note for note in lines.notes] == [True]
    assert "without piqa" in lines.summaries[-1]


@pytest.mark.parametrize("suite", ["piqa", "first, piqa"])
def test_a_dry_run_says_which_tasks_need_the_hub(checkpoint, settings, workspace, suite):
    asked = settings.model_copy(update={"suite": suite})
    plan = plan_evaluate(Settings(evaluation=asked), workspace=workspace, models=[checkpoint])
    states = {task["task"]: task["state"] for task in plan.tasks}
    assert "needs the hub" in states.pop("piqa")
    assert states == ({"first": "3 items to measure"} if "first" in suite else {})


def test_what_cannot_be_evaluated_is_refused_before_anything_is_measured(
    checkpoint, settings, workspace, tmp_path
):
    wrong = settings.model_copy(update={"suite": "first,secnd"})
    with refused(UserError, "secnd", "second"):
        evaluate(checkpoint, wrong, workspace)
    with pytest.raises(UserError, match="is for 3 layers"):
        evaluate(checkpoint, settings, workspace, schedule=IterationSchedule((1, 1, 1)))
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(tmp_path, settings, workspace)
    file = Path(str(settings.include_path)) / "second.yaml"
    file.write_text("task: [")
    with pytest.raises(UserError, match=str(file)):
        evaluate(checkpoint, settings, workspace)
    assert not list(workspace.evaluations.glob("*"))


# Interrupted evaluations


WORDS = ["bag", "fog", "hen", "pig", "cab", "deed", "face", "bead"]
SAMPLED = {"until": ["."], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {},
    "rolling": {},
    "questions": {"generation_kwargs": SAMPLED},
}


@pytest.fixture
def longer(tmp_path, save_tiny) -> Path:
    return save_tiny(tmp_path / "run", initializer_std=0.3, context_length=32)


@pytest.fixture
def kinds(tmp_path) -> EvaluationSettings:
    folder = tmp_path / "tasks"
    rows = [
        {"context": text, "question": text, "answer": "0", "text": text * 9,
         "endings": ["end", f"{word} gone"], "label": 0}
        for word in WORDS
        for text in [f"a {word} and the {word} had"]
    ]  # fmt: skip
    for name, changes in TASKS.items():
        write_task(folder, name, rows, **changes)
    return EvaluationSettings(suite=",".join(TASKS), include_path=str(folder), batch_size=2)


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Count the tokens of each forward pass of any decoder."""
    sizes: list[int] = []

    def record(module: torch.nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            sizes.append(arguments[0].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        yield sizes
    finally:
        handle.remove()


def planned(model: Path, settings: EvaluationSettings, workspace: Workspace) -> dict[str, str]:
    """Return what a dry run says about each task."""
    plan = plan_evaluate(Settings(evaluation=settings), workspace=workspace, models=[model])
    return {row["task"]: row["state"] for row in plan.rows()}


CASES = [
    *((name, "decoder") for name in TASKS),
    pytest.param("choices", "transformers", marks=pytest.mark.slow),
]
"""Task, and what runs the model."""


@pytest.mark.parametrize(("name", "runner"), CASES)
def test_the_same_command_does_only_the_rest(name, runner, longer, kinds, save_llama, tmp_path):
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = longer if runner == "decoder" else save_llama(rope_parameters=scaled)
    assert (open_model(model).config is None) == (runner == "transformers")
    settings = kinds.model_copy(update={"suite": name})
    with counted_passes() as all_passes:
        undisturbed = evaluate(model, settings, open_workspace(tmp_path / "other"))
    workspace = open_workspace(tmp_path / "workspace")
    with counted_passes() as first_passes, pytest.raises(KeyboardInterrupt):
        evaluate(model, settings, workspace, progress=KeptProgress(1))
    assert [path.suffix for path in workspace.evaluations.iterdir()] == [".answers"]
    states = [planned(model, settings, workspace)]
    progress = KeptProgress()
    with counted_passes() as later_passes:
        resumed = evaluate(model, settings, workspace, progress=progress)
    assert first_passes
    assert later_passes
    assert sorted(first_passes + later_passes) == sorted(all_passes), "each pass ran once"
    assert resumed == undisturbed
    assert f"{name}: " in progress.notes[0]
    assert "answers" in progress.notes[0]
    assert progress.done == sorted(progress.done)
    assert all(path.is_dir() for path in workspace.evaluations.iterdir())
    states.append(planned(model, settings, workspace))
    assert re.fullmatch(r"8 items .* \d+ answers", states[0][name])
    assert states[1] == {name: "8 items, stored"}


def test_a_trial_uses_what_an_interrupted_command_measured(longer, kinds, tiny_tokens, tmp_path):
    settings = kinds.model_copy(update={"suite": "choices"})
    workspace, untouched = (open_workspace(tmp_path / name) for name in ("workspace", "other"))
    with counted_passes() as first_passes, pytest.raises(KeyboardInterrupt):
        evaluate(longer, settings, workspace, progress=KeptProgress(1))
    config = load_config(longer)
    measured = []
    fingerprints = load_tasks(settings, tiny_tokens, config, Progress())
    suite = plan_suite(settings, tiny_tokens, config, fingerprints)
    for place in (workspace, untouched):
        trial = checkpoint_trial("trial", "x", longer, config, suite, place)
        with counted_passes() as passes:
            result = run_trial(trial)
        assert result
        measured.append((result.numbers, passes))
    (numbers, later_passes), (usual_numbers, all_passes) = measured
    assert numbers == usual_numbers
    assert sorted(first_passes + later_passes) == sorted(all_passes), "each pass ran once"
    # Batches of another size may round otherwise, so they use no answer of these.
    wider = settings.model_copy(update={"batch_size": 3, "limit": 7})
    narrower = wider.model_copy(update={"batch_size": 2})
    with pytest.raises(KeyboardInterrupt):
        evaluate(longer, narrower, workspace, progress=KeptProgress(1))
    evaluation = evaluate(longer, wider, workspace)
    assert evaluation == evaluate(longer, wider, untouched)
