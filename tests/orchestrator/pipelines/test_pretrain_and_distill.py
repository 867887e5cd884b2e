"""Stages that train: found again by content, told to the tracker, nothing left by a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.pipelines import distilling as distill_module
from orchestrator.pipelines import pretraining as pretrain_module
from orchestrator.pipelines.distilling import distill
from orchestrator.pipelines.pretraining import plan_pretraining, pretrain
from orchestrator.settings import Settings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.checkpoint import find_checkpoints, load_config
from orchestrator.training.job import TrainingJob, TrainingOutcome
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.folders import Workspace

RECIPE = {
    "num_steps": 6,
    "num_tokens_per_step": 64,
    "warmup_steps": 1,
    "num_validation_tokens": 64,
    "checkpoint_every_steps": 2,
}


class FakeRun:
    """Remembers how a tracked run ended."""

    def __init__(self, kind: str, statuses: list[tuple[str, str]]) -> None:
        self.kind, self.statuses = kind, statuses
        self.tags: dict[str, str] = {}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def log_dataset(self, name: str, digest: str, profile: Mapping[str, object]) -> None:
        assert (name, len(digest)) == ("tokens", 16)
        assert profile["train_tokens"]

    def mirror(self, folder: Path) -> None:
        assert folder.is_dir()

    def finish(self, status: str) -> None:
        self.statuses.append((self.kind, status))


class FakeTracking:
    """Stands for MLflow: remembers what it was asked for."""

    def __init__(self) -> None:
        self.statuses: list[tuple[str, str]] = []

    def run(self, key: str, *, kind: str, **_: Any) -> FakeRun:
        return FakeRun(kind, self.statuses)


class Notes(Progress):
    """Keeps what the user would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.summaries: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: str) -> None:
        self.summaries.append(summary)


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
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run jobs in this process instead of under Ray."""

    def run_here(
        jobs: Sequence[TrainingJob], *_: Any, watch: Callable[[], None], **__: Any
    ) -> list[TrainingOutcome]:
        outcomes = [run_job(job) for job in jobs]
        watch()
        return outcomes

    for module in (pretrain_module, distill_module):
        monkeypatch.setattr(module, "run_jobs", run_here)


def fake() -> tuple[FakeTracking, Tracking]:
    tracking = FakeTracking()
    return tracking, cast("Tracking", tracking)


def test_several_models_are_trained_and_found_again(
    workspace: Workspace, tiny_tokens: Path
) -> None:
    fake_tracking, tracking = fake()
    variants = {"teacher": settings(), "vanilla": settings("vanilla")}
    notes = Notes()
    first = pretrain(variants, workspace, tiny_tokens, tracking=tracking, progress=notes)
    assert list(first) == ["teacher", "vanilla"]
    assert [load_config(folder).method for folder in first.values()] == ["iiet", "vanilla"]
    assert first["teacher"].parent.name.startswith("iiet-r2-")
    assert first["vanilla"].parent.name.startswith("vanilla-")
    assert (first["teacher"].parent / "settings.yaml").is_file()
    assert fake_tracking.statuses == [("pretrain", "FINISHED")] * 2
    assert "teacher" in notes.summaries[0]

    assert pretrain(variants, workspace, tiny_tokens, tracking=tracking, progress=notes) == first
    assert "found again" in notes.summaries[1]


def test_a_name_that_is_taken_changes_nothing(workspace: Workspace, tiny_tokens: Path) -> None:
    _, tracking = fake()
    pretrain({"a": settings()}, workspace, tiny_tokens, tracking=tracking, name="mine")
    before = (workspace.runs / "mine" / "settings.yaml").read_text()
    with pytest.raises(UserError, match=r"recipe\.learning_rate was 0\.\d+, is 0\.5"):
        pretrain(
            {"a": settings(learning_rate=0.5)},
            workspace,
            tiny_tokens,
            tracking=tracking,
            name="mine",
        )
    assert (workspace.runs / "mine" / "settings.yaml").read_text() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"num_tokens_per_step": 65}}, "multiple of the context length"),
        ({"cluster": {"num_gpus": 800}}, "--gpus 800"),
        ({"cluster": {"num_workers": 3000}}, "3000 workers"),
    ],
)
def test_a_mistake_writes_nothing(
    workspace: Workspace, tiny_tokens: Path, changes: dict[str, Any], sentence: str
) -> None:
    fake_tracking, tracking = fake()
    tree = settings().model_dump(mode="json")
    for section, values in changes.items():
        tree[section] |= values
    with pytest.raises(UserError, match=sentence):
        pretrain({"a": resolve_settings(tree)}, workspace, tiny_tokens, tracking=tracking)
    assert not workspace.runs.exists()
    assert fake_tracking.statuses == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("x"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (OSError("x"), "FAILED")],
)
def test_the_tracker_hears_how_it_ended(
    workspace: Workspace,
    tiny_tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pretrain_module, "run_jobs", end)
    fake_tracking, tracking = fake()
    with pytest.raises(type(error)):
        pretrain({"a": settings()}, workspace, tiny_tokens, tracking=tracking)
    assert fake_tracking.statuses == [("pretrain", status)]


def test_a_damaged_checkpoint_is_told_once(workspace: Workspace, tiny_tokens: Path) -> None:
    _, tracking = fake()
    job = plan_pretraining(settings(), workspace, tiny_tokens)
    steps = iter(range(100))
    run_job(job, should_stop=lambda: next(steps) == 5)
    newest = find_checkpoints(job.folder)[-1]
    (newest / "training_state.pt").write_bytes(b"")
    notes = Notes()
    for _ in range(2):
        pretrain({"a": settings()}, workspace, tiny_tokens, tracking=tracking, progress=notes)
    assert len(notes.notes) == 1
    assert str(newest) in notes.notes[0]


def test_a_student_is_trained_and_found_again(workspace: Workspace, tiny_tokens: Path) -> None:
    fake_tracking, tracking = fake()
    teacher = pretrain({"a": settings()}, workspace, tiny_tokens, tracking=tracking)["a"]
    student = distill(settings(), workspace, teacher, "1,0", tiny_tokens, tracking=tracking)
    assert load_config(student).corrections.corrections == (1, 0)
    assert student.parent.parent == workspace.trials
    assert fake_tracking.statuses[-1] == ("distill", "FINISHED")
    again = distill(settings(), workspace, teacher, "1,0", tiny_tokens, tracking=tracking)
    assert again == student


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [("3", "more corrections than the teacher"), ("1,1,1", "2"), ("many", "many")],
)
def test_a_schedule_that_does_not_fit_is_refused(
    workspace: Workspace, tiny_tokens: Path, schedule: str, sentence: str
) -> None:
    _, tracking = fake()
    teacher = pretrain({"a": settings()}, workspace, tiny_tokens, tracking=tracking)["a"]
    with pytest.raises(UserError, match=sentence):
        distill(settings(), workspace, teacher, schedule, tiny_tokens, tracking=tracking)
    assert not workspace.trials.exists()
