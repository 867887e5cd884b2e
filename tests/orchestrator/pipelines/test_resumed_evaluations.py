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
from kept_progress import KeptProgress
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
        evaluate(checkpoint, settings, workspace, KeptProgress(1))
    assert [path.suffix for path in workspace.evaluations.iterdir()] == [".answers"]
    states = [planned(checkpoint, settings, workspace)]
    progress = KeptProgress()
    with counted_passes() as rest:
        resumed = evaluate(checkpoint, settings, workspace, progress)
    assert before
    assert rest
    assert sorted(before + rest) == sorted(whole), "each pass ran once"
    assert resumed == usual
    assert f"{name}: " in progress.notes[0]
    assert "answers were stored before an interruption" in progress.notes[0]
    assert progress.done == sorted(progress.done)
    assert all(path.is_dir() for path in workspace.evaluations.iterdir())
    states.append(planned(checkpoint, settings, workspace))
    assert re.fullmatch(r"8 items to measure; resumes after \d+ answers", states[0][name])
    assert states[1] == {name: "8 items, stored"}


def test_a_trial_uses_what_an_interrupted_command_measured(
    checkpoint: Path, settings: EvaluationSettings, tiny_tokens: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"suite": "choices"})
    workspace, other = (open_workspace(tmp_path / name) for name in ("workspace", "other"))
    with counted_passes() as before, pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, settings, workspace, KeptProgress(1))
    config, found = load_config(checkpoint), []
    fingerprints = load_tasks(settings, tiny_tokens, config, Progress())
    suite = plan_suite(settings, tiny_tokens, config, fingerprints)
    for place in (workspace, other):
        trial = checkpoint_trial("trial", "x", checkpoint, config, suite, place)
        with counted_passes() as passes:
            result = run_trial(trial)
        assert result
        found.append((result.numbers, passes))
    (numbers, rest), (usual, whole) = found
    assert numbers == usual
    assert sorted(before + rest) == sorted(whole), "each pass ran once"
    # Other batches may round otherwise, so they use no answer of these.
    wider = settings.model_copy(update={"batch_size": 3, "limit": 7})
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, wider.model_copy(update={"batch_size": 2}), workspace, KeptProgress(1))
    found_here = evaluate(checkpoint, wider, workspace, Progress())
    assert found_here == evaluate(checkpoint, wider, other, Progress())


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
        evaluate(tmp_path / "gpt2", only, workspace, KeptProgress(1))
    assert list(workspace.evaluations.glob("*.answers"))
    progress = KeptProgress()
    assert evaluate(tmp_path / "gpt2", only, workspace, progress) == usual
    assert "choices: " in progress.notes[0]
    assert not list(workspace.evaluations.glob("*.answers"))
