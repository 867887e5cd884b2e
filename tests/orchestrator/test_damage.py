"""The damage table: whatever is damaged in a workspace, no reader gives a wrong answer in silence.

Each row is a kind of file with the commands that read it; each is damaged in every way. A command
then gives its usual answer, or says which file is damaged, or ends with one sentence that names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_size import SMALL

from orchestrator import cli
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.sweeps import plan_students
from orchestrator.reporting.sweep_results import StoredSweep
from orchestrator.settings import read_settings
from orchestrator.sweeping.trial_run import run_trial
from orchestrator.training.checkpoint_lookup import newest_checkpoint
from orchestrator.training.model_lookup import load_influence_table
from orchestrator.workspace.folders import Workspace, open_workspace

SETTINGS = [
    *SMALL, "data.max_documents=120",
    "model.num_layers=2", "model.context_length=32", "model.corrections=1",
    "training.num_steps=4", "training.checkpoint_every_steps=2", "training.keep_best=true",
    "influence.num_tokens=128", "evaluation.num_items=8", "sweep.num_schedules=2",
]  # fmt: skip
OPTIONS = [f"--set={assignment}" for assignment in SETTINGS]
"""Last assignments count."""

COMMANDS = {
    "list": ["list", "--json"],
    "status": ["status", "--json"],
    "clean": ["clean", "--dry-run", "--json"],
    "generate": ["generate", "full", "--prompt", "The", "-n", "4"],
    "evaluate": ["evaluate", "full", "--json", *OPTIONS],
    "influence": ["influence", "full", "--json", *OPTIONS],
    "report": ["report", "--json"],
    "plan": ["sweep-threshold", "full", "--dry-run", *OPTIONS],
    "pretrain": ["pretrain", "--local", "--name", "full", "--json", *OPTIONS],
    "prepare": ["prepare", "--json", *OPTIONS],
    "export": ["export", "full", "--no-measure", "--json"],
    "import": ["import", "exports/full", "--name", "again", "--json"],
}
MODEL = ("generate", "plan")
READERS: dict[str, tuple[str, ...]] = {
    "workspace.json": ("list", "generate"),
    "tokens/*/manifest.json": ("plan", "prepare"),
    "tokens/*/train.bin": ("plan", "prepare"),
    "tokens/*/validation.bin": ("evaluate",),
    "tokens/*/validation.jsonl": ("evaluate",),
    "tokens/*/tokenizer.json": ("prepare",),
    "tokens/*/.verified.json": ("prepare", "evaluate"),
    "tokens/*/heldout-*/suite.json": ("evaluate", "plan"),
    "tokens/*/heldout-*/lastword.jsonl": ("evaluate", "plan"),
    "tokens/*/heldout-*/lastword.yaml": ("evaluate",),
    "tokens/*/heldout-*/.verified.json": ("evaluate",),
    "tokens/sources/*.json": ("prepare",),
    "runs/full/job.json": ("list", "status", "clean", "plan", "pretrain"),
    "runs/full/done.json": ("list", "status", "clean", "plan", "pretrain"),
    "runs/full/best.json": ("clean", "pretrain"),
    "runs/full/journal.jsonl": ("list", "status"),
    "runs/full/step_00000004/config.json": (*MODEL, "evaluate", "pretrain"),
    "runs/full/step_00000004/model.safetensors": (*MODEL, "clean", "evaluate", "pretrain"),
    "runs/full/step_00000004/provenance.json": (*MODEL, "clean"),
    "runs/full/step_00000004/tokenizer.json": MODEL,
    "runs/full/step_00000004/training_state.pt": ("pretrain",),
    "runs/full/step_00000004/.verified.json": MODEL,
    "runs/full/step_00000004/influence-cosine.json": ("influence", "plan"),
    "trials/*/job.json": ("list", "clean", "plan"),
    "trials/*/done.json": ("list", "plan"),
    "trials/*/result-*.json": ("list", "clean", "plan"),
    "sweeps/s/plan.json": ("list", "status", "clean", "plan"),
    "sweeps/s/results.json": ("list", "clean", "report"),
    "evaluations/*.json": ("clean", "evaluate", "report"),
    "exports/full/config.json": ("import",),
    "exports/full/model.safetensors": ("import",),
    "exports/full/tokenizer.json": ("import",),
}
"""By file: the commands that read it."""

SAID = {
    "tokens/*/heldout-*/suite.json": ("nothing is left",),  # Only notes on the tasks are missing.
    "runs/full/done.json": ("stopped at 4/4", "'found': []"),
    "trials/*/done.json": ("stopped at 3/3",),
    "trials/*/result-*.json": ("to measure",),
    "sweeps/s/plan.json": ("without a plan",),
    "sweeps/s/results.json": ("'has_report': False", "has no finished sweep"),
    "runs/full/step_00000004/influence-cosine.json": ("influence is not",),
}
"""Where a missing file is what an interrupted command leaves: words of the right answer."""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _nest(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


HARMS: dict[str, Callable[[Path], None]] = {
    "cut": _cut, "flipped": _flip, "missing": Path.unlink, "a folder": _replace_by_folder,
    "nested": _nest,
    "foreign": lambda path: path.write_text('{"trials": 1, "job": [1], "step": "x"}\n') and None,
}  # fmt: skip


@dataclass
class Copies:
    """A workspace at one place that is restored before each command."""

    whole: Path
    root: Path
    usual: dict[str, Any]

    def restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.whole, self.root)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copies]:
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        workspace = open_workspace(folder / "whole")
        _fill(workspace)
        yield Copies(workspace.root, folder / "copy", {})


def _fill(workspace: Workspace) -> None:
    for name in ("pretrain", "influence", "evaluate", "export"):
        assert cli.main([*COMMANDS[name], "--workspace", str(workspace.root)]) == 0
    next(workspace.exports.iterdir()).rename(workspace.exports / "full")
    settings, context = read_settings(None, SETTINGS), Context(workspace)
    teacher = newest_checkpoint(workspace.runs / "full")
    assert teacher
    influence = load_influence_table(teacher)
    plan = plan_students(settings, context, teacher, influence, name="s")
    plan.write(workspace.sweeps / "s" / "plan.json")
    results = [run_trial(trial).result for trial in plan.trials]
    StoredSweep(
        name="s", key=plan.key, results=tuple(r for r in results if r), influence=influence
    ).store(workspace)


def _ask(copies: Copies, name: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    """Run a command; return its exit code, its answer without sizes and times, and its words."""
    capfd.readouterr()
    words = [str(copies.root / w) if w == "exports/full" else w for w in COMMANDS[name]]
    code = cli.main([*words, "--workspace", str(copies.root)])
    printed = capfd.readouterr()
    answer = _timeless(json.loads(printed.out)) if printed.out[:1] == "{" else printed.out
    words = printed.out if printed.out[:1] != "{" else str(answer)
    return code, answer, words + printed.err


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("bytes", "changed")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


ONLY_OF_JSON = ("nested", "foreign")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "harm"),
    [(p, h) for p in READERS for h in HARMS if p.endswith(".json") or h not in ONLY_OF_JSON],
)
def test_each_damage_is_harmless_or_named(
    pattern: str, harm: str, copies: Copies, capfd: pytest.CaptureFixture[str]
) -> None:
    problems = []
    for name in READERS[pattern]:
        if name not in copies.usual:
            copies.restore()
            code, copies.usual[name], words = _ask(copies, name, capfd)
            print(name, words[-1500:])
            assert code == 0, words
        copies.restore()
        path = min(copies.root.glob(pattern))
        HARMS[harm](path)
        code, answer, words = _ask(copies, name, capfd)
        is_named = path.name in "".join(words.split())
        if harm in ("missing", "a folder"):
            is_named |= any(said in words for said in SAID.get(pattern, ()))
        is_right = code == 0 and (answer == copies.usual[name] or is_named)
        folder = "/".join(path.parts[-3:-1])
        is_one_sentence = code in (1, 2) and (is_named or folder in words) and len(words) < 1000
        if "The traceback is in" in words or not (is_right or is_one_sentence):
            usual = str(copies.usual[name])
            new = [line for line in words.splitlines() if line.strip(" ,") not in usual]
            problems.append(f"{name} ended with {code}: {new or words}")
            if log := words.partition("The traceback is in ")[2].strip():
                problems.append(Path("".join(log.split())).read_text()[-1500:])
    assert not problems, "\n".join(problems)
