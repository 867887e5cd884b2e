"""Pretraining and distilling: found again by content, tracked, and a mistake leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
from fake_tracking import FakeTracking
from kept_progress import KeptProgress
from refusals import refused
from same_run import called_in_step, stop_at

from orchestrator import cli
from orchestrator.models.folder import load_config, load_provenance, weights_key
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.training import (
    DistillResult,
    PretrainResult,
    TrainingPlan,
    plan_distill,
    plan_models,
    plan_pretrain,
    run_distill,
    run_pretrain,
    run_trainings,
)
from orchestrator.settings import SETTINGS_NAME, Settings, read_settings, resolve_settings, to_yaml
from orchestrator.tracking.tracker import Tracking
from orchestrator.training.job import pretraining_job
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.layout import Workspace, find_checkpoints

RECIPE = {
    "num_steps": 6,
    "num_tokens_per_step": 64,
    "warmup_steps": 1,
    "num_validation_tokens": 64,
    "checkpoint_every_steps": 2,
}


def train(
    models: dict[str, Settings], context: Context, tokens: Path, **options: Any
) -> dict[str, PretrainResult]:
    """Plan and train models in this process; see `plan_models`."""
    plan = plan_models(models, context.workspace, tokens, **{"local": True, **options})
    return run_trainings(plan, context)


def students(context: Context, teacher: Path, tokens: Path, *schedules: str) -> list[DistillResult]:
    """Plan and distill students of a teacher."""
    copied_tokens = context.workspace.tokens / tokens.name
    if not copied_tokens.exists():
        shutil.copytree(tokens, copied_tokens)
    plan = plan_distill(
        settings(), workspace=context.workspace, schedules=schedules, teacher=teacher, local=True
    )
    return run_distill(plan, context).students


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise OSError("no space left")


def settings(method: str = "iiet", **changes: Any) -> Settings:
    sizes = {"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 32, "context_length": 16}
    return resolve_settings(
        {
            "model": {"method": method, "corrections": 2, **sizes},
            "training": {**RECIPE, **changes},
            "distillation": {"training": {**RECIPE, "learning_rate": 1e-4}},
        }
    )


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch) -> None:
    """Trainings in this process have one thread: two of them wait for each other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
def notes() -> KeptProgress:
    return KeptProgress()


@pytest.fixture
def context(workspace, notes, tracking) -> Context:
    return Context(workspace, notes, tracking=cast("Tracking", tracking))


def test_several_models_are_trained_and_found_again(context, tiny_tokens, tracking, notes):
    models = {"teacher": settings(), "vanilla": settings("vanilla")}
    results = train(models, context, tiny_tokens)
    assert list(results) == ["teacher", "vanilla"]
    folders = {label: result.checkpoint for label, result in results.items()}
    assert [load_config(folder).method for folder in folders.values()] == ["iiet", "vanilla"]
    assert folders["teacher"].parent.name.startswith("iiet-r2-")
    assert folders["vanilla"].parent.name.startswith("vanilla-")
    assert (folders["teacher"].parent / "settings.yaml").is_file()
    assert tracking.statuses == [("pretrain", "FINISHED")] * 2
    assert "teacher" in notes.summaries[0]
    assert train(models, context, tiny_tokens) == results
    assert "found again" in notes.summaries[1]
    # The table has a row for each logged step.
    table = results["teacher"].to_pandas()
    assert list(table["step"]) == sorted(set(table["step"]))
    assert table["step"].iloc[-1] == RECIPE["num_steps"]
    assert table["train/loss"].notna().any()
    last = table["validation/loss"].dropna().iloc[-1]
    assert last == pytest.approx(results["teacher"].validation_loss)

    # A name that is taken changes nothing.
    train({"a": settings()}, context, tiny_tokens, name="mine")
    stored = context.workspace.runs / "mine" / "settings.yaml"
    before = stored.read_text()
    with refused(UserError, "recipe.learning_rate", "0.5"):
        plan_models({"a": settings(learning_rate=0.5)}, context.workspace, tiny_tokens, name="mine")
    assert stored.read_text() == before


def test_a_mistake_writes_nothing(context, tiny_tokens, tracking):
    tree = settings().model_dump(mode="json")
    for section, value, sentence in (
        ("training", {"num_tokens_per_step": 65}, "multiple of the context length"),
        ("cluster", {"num_workers": 3000}, "3000 workers cannot share"),
        ("cluster", {"num_gpus": 2}, "cluster.num_gpus=2: this machine has"),
    ):
        wrong = resolve_settings({**tree, section: tree[section] | value})
        with pytest.raises(UserError, match=sentence):
            train({"a": wrong}, context, tiny_tokens, local=False)
    assert not context.workspace.runs.exists()
    assert tracking.statuses == []


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        (press_ctrl_c, Interrupted, "KILLED"),
        (fail, OSError, "FAILED"),
    ],
)
def test_the_tracked_run_ends_with_the_status_of_the_training(
    context, tiny_tokens, tracking, call, error, status
):
    with called_in_step(1, call), pytest.raises(error):
        train({"a": settings()}, context, tiny_tokens)
    assert tracking.statuses == [("pretrain", status)]


def test_the_tracked_run_of_a_training_that_ctrl_c_ends_before_its_first_step_was_killed(
    context, tiny_tokens, tracking, monkeypatch
):
    def press(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.set_num_threads", press)
    with pytest.raises(KeyboardInterrupt):
        train({"a": settings()}, context, tiny_tokens)
    assert tracking.statuses == [("pretrain", "KILLED")]


def test_a_damaged_checkpoint_is_reported_once(context, tiny_tokens, notes):
    job = pretraining_job(settings(), context.workspace, tiny_tokens)
    run_job(job, should_stop=stop_at(5))
    newest = find_checkpoints(job.folder)[-1]
    (newest / "training_state.pt").write_bytes(b"")
    for _ in range(2):
        train({"a": settings()}, context, tiny_tokens)
    assert len(notes.notes) == 1
    assert str(newest) in notes.notes[0]


@pytest.mark.slow
def test_a_finished_run_is_continued_on_its_own_tokens(context, tiny_tokens, tracking, notes):
    tokens = context.workspace.tokens / tiny_tokens.name
    shutil.copytree(tiny_tokens, tokens)
    run = context.workspace.runs / "short"
    wsd = settings(decay="wsd", decay_fraction=0.5)
    job = pretraining_job(wsd, context.workspace, tokens, "short")
    run_job(job, should_stop=stop_at(3))
    write_text(run / SETTINGS_NAME, to_yaml(wsd))
    longer = read_settings(run / SETTINGS_NAME, ["training.num_steps=12"])
    with refused(UserError, "finished"):
        run_pretrain(plan_pretrain(longer, workspace=context.workspace, continued="short"), context)
    train({"a": wsd}, context, tokens, name="short")

    plan = plan_pretrain(longer, workspace=context.workspace, continued="short")
    assert plan.to_json()["state"] == "from step 4"
    assert plan.price.num_tokens == (12 - 4) * 64
    result = run_pretrain(
        plan_pretrain(
            longer, workspace=context.workspace, continued="short", name="long", local=True
        ),
        context,
    )
    assert "short from step 4 of 12" in notes.notes[-1], "the fourth step is equal"
    scratch = read_settings(result.checkpoint.parent / SETTINGS_NAME)
    assert round(12 * scratch.training.iterate_from_fraction) == round(6 * 0.6)
    expected = train({"a": scratch}, context, tokens, name="scratch")["a"]
    assert weights_key(result.checkpoint) == weights_key(expected.checkpoint)
    assert result.validation_loss == expected.validation_loss
    origins = [tag for run in tracking.published if (tag := run.tags.get("iiet.continued_from"))]
    assert [Path(origin).parent.name for origin in origins] == ["short"]

    of_other_tokens = read_settings(
        run / SETTINGS_NAME, ["training.num_steps=12", "data.vocab_size=500"]
    )
    with refused(UserError, "tokens"):
        run_pretrain(
            plan_pretrain(of_other_tokens, workspace=context.workspace, continued="short"), context
        )
    (run / SETTINGS_NAME).unlink()
    with refused(UserError, "iiet-orch pretrain"):
        run_pretrain(plan_pretrain(longer, workspace=context.workspace, continued=run), context)


@pytest.fixture
def teacher(context, tiny_tokens) -> Path:
    return train({"a": settings()}, context, tiny_tokens)["a"].checkpoint


def test_a_student_is_trained_and_found_again_and_a_wrong_schedule_trains_none(
    context, teacher, tiny_tokens, tracking
):
    wrong = {"3": "more corrections than the teacher", "1,1,1": "2", "many": "many"}
    for schedule, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence):
            students(context, teacher, tiny_tokens, "1", schedule)
    assert not context.workspace.trials.exists()
    (student,) = students(context, teacher, tiny_tokens, "1,0")
    assert student.schedule == str(load_config(student.checkpoint).corrections) == "1,0"
    assert student.checkpoint.parent.parent == context.workspace.trials
    assert tracking.statuses[-1] == ("distill", "FINISHED")
    assert students(context, teacher, tiny_tokens, "1,0") == [student]


def test_a_student_may_have_a_name(context, teacher, tiny_tokens, save_tiny, capfd):
    save_tiny(context.workspace.runs / "imported", provenance={"imported": {"from": "elsewhere"}})
    shutil.copytree(tiny_tokens, context.workspace.tokens / tiny_tokens.name)
    chosen = settings()
    options = {"workspace": context.workspace, "teacher": teacher, "local": True}
    plan = plan_distill(chosen, schedules=["1,0"], name="mine", **options)
    (student,) = run_distill(plan, context).students
    assert student.checkpoint.parent == context.workspace.runs / "mine"
    planned_again = plan_distill(chosen, schedules=["1,0"], name="mine", **options)
    assert list(planned_again.finished.values()) == [student.checkpoint]
    several = plan_distill(chosen, schedules=["1,0", "1,1"], name="two", **options)
    folders = [job.folder.name for job in several.jobs.values()]
    assert folders == ["two-1,0", "two-1"]
    for schedules, name, words in (
        (["0,0"], "mine", "holds a run with other settings"),
        (["1,0"], "imported", "holds an imported model"),
    ):
        with pytest.raises(UserError, match=words):
            plan_distill(chosen, schedules=schedules, name=name, **options)
    command = [
        "distill", str(teacher), "-r", "1,0", "--name", "mine", "--dry-run",
        "-w", str(context.workspace.root),
    ]  # fmt: skip
    assert cli.main(command) == 2, "mine was trained by other settings"
    assert "mine" in capfd.readouterr().err


def test_a_schedule_is_refused_before_tokens_are_asked_for(context, teacher):
    options = {"workspace": context.workspace, "teacher": teacher}
    with refused(UserError, "corrections"):
        plan_distill(settings(), schedules=["3"], **options)
    with pytest.raises(UserError, match="iiet-orch prepare"):
        plan_distill(settings(), schedules=["1"], **options)


# Students of fewer layers


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iiet", "vanilla"])
def test_a_student_leaves_layers_out_and_starts_with_those_that_stay(
    method, context, tiny_tokens, tracking
):
    tokens = shutil.copytree(tiny_tokens, context.workspace.tokens / tiny_tokens.name)
    (trained,) = train({"teacher": settings(method)}, context, tokens).values()
    teacher = trained.checkpoint

    def plan(**options: Any) -> TrainingPlan:
        return plan_distill(
            settings(),
            workspace=context.workspace,
            schedules=["x,0"],
            teacher=teacher,
            local=True,
            **options,
        )

    before = sorted(context.workspace.root.rglob("*"))
    planned = plan()
    assert sorted(context.workspace.root.rglob("*")) == before, "a plan only reads"
    (student,) = planned.to_json()["students"]
    assert student["schedule"] == "x,0"
    [job] = planned.jobs.values()
    assert job.kept_layers == (1,)
    assert (job.model.num_layers, job.model.method) == (1, method)
    assert (job.objective, job.teacher_folder) == ("distill", str(teacher))

    (distilled,) = run_distill(planned, context).students
    assert distilled.schedule == "x,0"
    assert load_config(distilled.checkpoint).num_layers == 1
    assert load_provenance(distilled.checkpoint)["kept_layers"] == [1]
    (run,) = [run for run in tracking.published if run.kind == "distill"][-1:]
    assert run.params["kept_layers"] == "1"
    assert run_distill(plan(), context).students == [distilled], "it is found again"
    (named,) = run_distill(plan(name="smaller"), context).students
    assert named.checkpoint.parent == context.workspace.runs / "smaller"
    assert weights_key(named.checkpoint) == weights_key(distilled.checkpoint)


def test_schedules_that_leave_out_too_much_are_refused(context, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, context.workspace.tokens / tiny_tokens.name)
    (trained,) = train({"teacher": settings()}, context, tokens).values()

    def plan(*changes: str, schedules: tuple[str, ...] = ("x,0",)) -> TrainingPlan:
        return plan_distill(
            resolve_settings(settings().model_dump(mode="json"), changes),
            workspace=context.workspace,
            teacher=trained.checkpoint,
            schedules=schedules,
        )

    with refused(UserError, "--schedule"):
        plan(schedules=())
    for schedule in ("x,x", "x,0,0", "x,9"):
        with refused(UserError, "--schedule"):
            plan(schedules=(schedule,))
    with refused(UserError, "distillation.control=pruned"):
        plan("distillation.control=pruned")
    with refused(UserError, "distillation.hidden_weight=0.5", "x,0"):
        plan("distillation.hidden_weight=0.5")
    scratch = plan("distillation.control=scratch")
    assert next(iter(scratch.jobs.values())).kept_layers is None, "random weights keep none"
