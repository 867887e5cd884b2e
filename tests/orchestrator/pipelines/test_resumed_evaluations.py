"""An interrupted evaluation goes on where it was, and ends with the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tracking import untracked
from lm_eval_tasks import write_task
from one_evaluation import evaluate_model

from orchestrator.data.store import open_tokens
from orchestrator.models.folder import load_config
from orchestrator.models.open import open_model
from orchestrator.pipelines.evaluating import plan_evaluate
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.sweeping.plan import load_tasks, plan_suite
from orchestrator.sweeping.students import checkpoint_trial
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace, open_workspace

WORDS = ["bag", "fog", "hen", "pig", "cab", "deed", "face", "bead"]
SAMPLED = {"until": ["."], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {},
    "rolling": {},
    "questions": {"generation_kwargs": SAMPLED},
}


class StopsAfter(Progress):
    """Raises like Ctrl-C when the progress is reported once too often; keeps notes and reports."""

    def __init__(self, reports: int | None = None) -> None:
        self.reports_left, self.notes, self.seen = reports, list[str](), list[float]()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self.seen.append(done)
        if self.reports_left is not None:
            self.reports_left -= 1
            if self.reports_left < 0:
                raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def checkpoint(tmp_path: Path, save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(tmp_path / "run", initializer_std=0.3, context_length=32)


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
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


def evaluate(
    model: Path, settings: EvaluationSettings, workspace: Workspace, progress: Progress
) -> EvaluationResult:
    return evaluate_model(open_model(model), settings, untracked(workspace, progress))


def planned(model: Path, settings: EvaluationSettings, workspace: Workspace) -> dict[str, str]:
    """Return what a dry run says about each task."""
    found = plan_evaluate(Settings(evaluation=settings), workspace=workspace, models=[model])
    return {row["task"]: row["state"] for row in found.rows()}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_command_does_only_the_rest(
    name: str, checkpoint: Path, settings: EvaluationSettings, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"suite": name})
    with counted_passes() as whole:
        usual = evaluate(checkpoint, settings, open_workspace(tmp_path / "other"), Progress())
    workspace = open_workspace(tmp_path / "workspace")
    with counted_passes() as before, pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, settings, workspace, StopsAfter(1))
    assert [path.suffix for path in workspace.evaluations.iterdir()] == [".answers"]
    states = [planned(checkpoint, settings, workspace)]
    progress = StopsAfter()
    with counted_passes() as rest:
        resumed = evaluate(checkpoint, settings, workspace, progress)
    assert before
    assert rest
    assert sorted(before + rest) == sorted(whole), "each pass ran once"
    assert resumed == usual
    assert f"{name}: " in progress.notes[0]
    assert "answers were stored before an interruption" in progress.notes[0]
    assert progress.seen == sorted(progress.seen)
    assert all(path.is_dir() for path in workspace.evaluations.iterdir())
    states.append(planned(checkpoint, settings, workspace))
    assert re.fullmatch(r"8 items to measure; resumes after \d+ answers", states[0][name])
    assert states[1] == {name: "8 items, stored"}


def test_another_batch_size_uses_no_answer_of_other_batches(
    checkpoint: Path, settings: EvaluationSettings, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"suite": "choices"})
    wider = settings.model_copy(update={"batch_size": 3})
    usual = evaluate(checkpoint, wider, open_workspace(tmp_path / "other"), Progress())
    workspace = open_workspace(tmp_path / "workspace")
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, settings, workspace, StopsAfter(1))
    assert evaluate(checkpoint, wider, workspace, Progress()) == usual


def test_a_trial_uses_what_an_interrupted_command_measured(
    checkpoint: Path, settings: EvaluationSettings, tiny_tokens: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"suite": "choices"})
    workspace = open_workspace(tmp_path / "workspace")
    with counted_passes() as before, pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, settings, workspace, StopsAfter(1))
    config = load_config(checkpoint)
    suite = plan_suite(
        settings, tiny_tokens, config, load_tasks(settings, tiny_tokens, config, Progress())
    )
    with counted_passes() as rest:
        result = run_trial(checkpoint_trial("trial", "x", checkpoint, config, suite, workspace))
    assert result
    other = open_workspace(tmp_path / "other")
    with counted_passes() as whole:
        usual = run_trial(checkpoint_trial("trial", "x", checkpoint, config, suite, other))
    assert usual
    assert result.numbers == usual.numbers
    assert sorted(before + rest) == sorted(whole), "each pass ran once"


@pytest.mark.slow
def test_a_model_of_transformers_resumes_too(
    settings: EvaluationSettings, tiny_tokens: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=320, **sizes)).save_pretrained(tmp_path / "gpt2")
    PreTrainedTokenizerFast(
        tokenizer_file=str(open_tokens(tiny_tokens).tokenizer_path), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "gpt2")
    only = settings.model_copy(update={"suite": "choices"})
    usual = evaluate(tmp_path / "gpt2", only, open_workspace(tmp_path / "other"), Progress())
    workspace = open_workspace(tmp_path / "workspace")
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "gpt2", only, workspace, StopsAfter(1))
    assert list(workspace.evaluations.glob("*.answers"))
    progress = StopsAfter()
    assert evaluate(tmp_path / "gpt2", only, workspace, progress) == usual
    assert "choices: " in progress.notes[0]
    assert not list(workspace.evaluations.glob("*.answers"))
