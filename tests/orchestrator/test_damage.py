"""The damage table: whatever is damaged in a workspace, no reader gives a wrong answer in silence.

Each row is a kind of file with its readers, which are commands or functions. A reader of a damaged
file gives its usual answer, or says which file is damaged, or ends with one sentence that names it.
The first readers meet some ways of damage, in turns; `make test-long` tries all others.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from changed_trials import stop_early
from commands import settings_options
from one_evaluation import evaluate_model
from sample_texts import help_texts, lines_of
from small_size import SMALL

from iiet.model.schedule import IterationSchedule
from orchestrator import cli
from orchestrator.evaluation import decode_timing
from orchestrator.models.folder import newest_checkpoint
from orchestrator.models.lookup import Picked, load_influence_table
from orchestrator.models.open import open_model
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.syncing import sync
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepTrials
from orchestrator.reporting.costs import with_costs
from orchestrator.reporting.results import StoredSweep, load_sweep_results
from orchestrator.settings import SETTINGS_NAME, read_settings, to_yaml
from orchestrator.sweeping.models import TEACHER, SweptModels
from orchestrator.sweeping.trial import run_trial
from orchestrator.sweeping.trials import make_search, trials_from_scratch, trials_of_teachers
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import pretraining_job
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.layout import PLAN_FILE, Workspace, checkpoint_name, open_workspace

SETTINGS = [
    *SMALL, "data.source=files", "data.files=[texts.jsonl]",
    "model.num_layers=2", "model.context_length=32", "model.corrections=1",
    "training.num_steps=2", "training.checkpoint_every_steps=1",
    "training.decay=constant", "distillation.training.num_steps=1",
    "influence.num_tokens=128", "evaluation.num_items=8", "evaluation.limit=3",
    "sweep.num_schedules=2",
]  # fmt: skip
"""Last assignments count."""
LONGER = [*SETTINGS, "training.decay=constant"]
SEARCH = ["full", "--search", "1", "--name", "search"]
RACE = ["--asha", "--rates", "1e-3,2e-3", "-r", "1", "--methods", "iiet"]


def small(*words: str) -> list[str]:
    """Return a command with those of `SETTINGS` that it reads."""
    return [*words, *settings_options(SETTINGS, words[0])]


COMMANDS = {
    "list": ["list", "--json"],
    "list running": ["list", "running", "--json"],
    "clean": ["clean", "--dry-run", "--json"],
    "generate": ["generate", "full", "--prompt", "The", "-n", "4"],
    "generate the pick": ["generate", "--prompt", "The", "-n", "4"],
    "evaluate": small("evaluate", "full", "--json"),
    "evaluate the rest": small("evaluate", "full", "-r", "0", "--json"),
    "influence": small("influence", "full", "--json"),
    "benchmark": ["benchmark", "full", "--new-tokens", "2", "--repetitions", "1"],
    "pick": ["pick", "--best", "--dry-run", "--json"],
    "plan": small("sweep-threshold", "full", "--dry-run"),
    "plan a search": small("sweep-threshold", *SEARCH, "--dry-run", "--json"),
    "plan a race": small("sweep-iterations", *RACE, "--dry-run", "--json"),
    "pretrain": small("pretrain", "--local", "--name", "full", "--json"),
    "continue": ["pretrain", "--continue", "full", "--steps", "4", "--dry-run", "--json"],
    "prepare": small("prepare", "--json"),
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
    "tokens/sources/*.json": ("prepare",),
    "runs/full/job.json": ("list", "list running", "clean", "plan", "pretrain"),
    "runs/full/done.json": ("list", "list running", "clean", "plan", "pretrain"),
    "runs/full/journal.jsonl": ("list", "list running"),
    "runs/full/step_00000002/config.json": (*MODEL, "evaluate", "pretrain"),
    "runs/full/step_00000002/model.safetensors": (*MODEL, "clean", "evaluate", "pretrain"),
    "runs/full/step_00000002/provenance.json": (*MODEL, "clean"),
    "runs/full/step_00000002/tokenizer.json": MODEL,
    "runs/full/step_00000002/training_state.pt": ("pretrain",),
    "runs/full/step_00000002/.verified.json": MODEL,
    "runs/full/step_00000002/influence-cosine.json": ("influence", "plan"),
    "runs/first/journal.jsonl": ("continue a run",),
    "runs/first/step_00000001/model.safetensors": ("continue a run",),
    "runs/first/step_00000001/provenance.json": ("continue a run",),
    "runs/first/step_00000001/training_state.pt": ("continue a run",),
    "trials/*/job.json": ("list", "clean", "plan"),
    "trials/*/done.json": ("list", "plan"),
    "trials/*/result-*.json": ("list", "clean", "plan"),
    "sweeps/s/plan.json": ("list", "list running", "clean", "plan"),
    "sweeps/s/results.json": ("list", "clean", "pick"),
    "evaluations/*/results_*.json": ("evaluate", "pick"),
    "evaluations/*/items.json": ("evaluate", "pick"),
    "evaluations/*/samples_*.jsonl": ("evaluate", "pick"),  # Only --log-samples reads them.
    "exports/full/config.json": ("import",),
    "exports/full/model.safetensors": ("import",),
    "exports/full/tokenizer.json": ("import",),
    "picked.json": ("generate the pick",),
    "runs/full/settings.yaml": ("continue",),
    "runs/*/stopped-early.json": ("list", "plan a race"),
    "evaluations/*.answers": ("list running", "evaluate the rest"),
    "benchmarks/*.json": ("clean",),
    "tracked/*.json": ("sync",),
    "sweeps/s/times.json": ("time the models",),
    "sweeps/s/journal.jsonl": ("list", "list running"),
    "sweeps/search/optuna.journal": ("plan a search",),
    "store.db": ("sync",),
}
"""By file: the commands and functions that read it."""


class Notes(Progress):
    """Keeps the words that a function says; raises like Ctrl-C after some reports, if asked to."""

    def __init__(self, reports: int = 10**6) -> None:
        self.words = list[str]()
        self._reports = reports

    def start(self, title: str, total: float | None = None) -> None:
        self.words.append(title)

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self._reports -= 1
        if self._reports < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.words.append(text)


def _run_to_continue(workspace: Workspace, name: str, *changes: str) -> TrainingJob:
    tokens = min(workspace.tokens.glob("*/manifest.json")).parent
    return pretraining_job(read_settings(None, [*LONGER, *changes]), workspace, tokens, name)


def _continue_a_run(workspace: Workspace, notes: Notes) -> Any:
    start = {"continued_from": str(workspace.runs / "first" / checkpoint_name(1))}
    job = _run_to_continue(workspace, "longer").model_copy(update=start)
    outcome = run_job(job)
    notes.words += [r["text"] for r in read_journal(job.folder)[0] if r.get("name") == "damaged"]
    return outcome.validation_loss


def _time_the_models(workspace: Workspace, notes: Notes) -> Any:
    plan = _plan(workspace)
    results = load_sweep_results(workspace, "s").results
    found = with_costs(results, plan, workspace.sweeps / "s", read_settings(None, SETTINGS), notes)
    return [trial.numbers for trial in found]


def _plan(workspace: Workspace) -> SweepTrials:
    plan = SweepTrials.read(workspace.sweeps / "s" / PLAN_FILE)
    assert plan
    return plan


def _sync(workspace: Workspace, notes: Notes) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # Not the workspace's own store, which may not be used in a copy.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.root}/store.db")
        sync(workspace=workspace, progress=notes)
    with closing(sqlite3.connect(workspace.root / "store.db")) as database:
        return [
            database.execute(f"SELECT key, value FROM {table} ORDER BY key, value").fetchall()
            for table in ("params", "metrics")
        ]


Reader = Callable[[Workspace, Notes], Any]
FUNCTIONS: dict[str, Reader] = {
    "sync": _sync,
    "continue a run": _continue_a_run,
    "time the models": _time_the_models,
}
"""What only a whole sweep does."""

CLEANED_WITHOUT_FULL = (
    "runs/first/step_00000001', 'reason': 'intermediate checkpoint of a finished training'}]"
)
SAID = {
    "tokens/*/heldout-*/suite.json": ("nothing is left",),  # Only notes on the tasks are missing.
    "runs/full/done.json": ("stopped at 2/2", CLEANED_WITHOUT_FULL),
    "trials/*/done.json": ("stopped at 1/1",),
    "trials/*/result-*.json": ("to measure",),
    "sweeps/s/plan.json": ("without a plan",),
    "sweeps/s/results.json": ("'has_report': False", "has no report"),
    "runs/full/step_00000002/influence-cosine.json": ("influence is not",),
    "sweeps/s/times.json": ("time per token",),
    "runs/*/stopped-early.json": ("'state': 'empty'", "'state': 'to train'"),
}
"""Where a missing file is what an interrupted command leaves: words of the right answer."""


SAID_OTHERWISE = {
    # As a killed search leaves it: finished trials enter it again, and the rest is asked for anew.
    "sweeps/search/optuna.journal": ("are not known yet",),
}
"""Words that stand for the name of the file."""


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        data = path.read_bytes()
        path.unlink()  # It may have another name.
        path.write_bytes(change(data))

    return harm


def _flip(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


NO_JSON = (".bin", ".pt", ".safetensors", ".db")
"""Ends of the names of files that hold no JSON, of which no part can be of another type."""
WITH_DIGEST = re.compile(r"tokens/\*/(validation|tokenizer)\.|step_\d+/(config|tokenizer)\.")
"""Texts in which a single other bit is noticed: those that lie beside weights and tokens."""
HARMS: dict[str, Callable[[Path], None]] = {
    "cut": _changed(lambda data: data[: len(data) // 2]),
    "flipped": _changed(_flip),
    "missing": Path.unlink,
    "a folder": _replace_by_folder,
    "nested": _changed(lambda _: b"[" * 100_000 + b"]" * 100_000 + b"\n"),
    "foreign": _changed(lambda _: b'{"trials": 1, "job": [1], "step": "x"}\n'),
}


IN_PLACE = (".jsonl", ".answers", ".journal", ".db", ".lock", "lock")
"""Ends of the names of files that are changed where they are; all others are replaced."""


class Copies:
    """A workspace, copied to a new place for each reader: MLflow keeps open what it has read."""

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.root = whole
        self.usual = dict[str, Any]()
        self._number = 1000

    def restore(self, *, exports: bool) -> None:
        if self.root != self.whole:
            shutil.rmtree(self.root)
        self._number += 1
        self.root = self.whole.with_name(f"copy-{self._number}")
        left_out = shutil.ignore_patterns("artifacts", "logs", *["exports"] * (not exports))
        shutil.copytree(self.whole, self.root, ignore=left_out, copy_function=_copy)


def _copy(source: str, target: str) -> None:
    if source.endswith(IN_PLACE):
        shutil.copy2(source, target)
    else:
        os.link(source, target)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Iterator[Copies]:
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        for name in ("SWEEP_NEW_TOKENS", "SWEEP_REPETITIONS"):
            patch.setattr(decode_timing, name, 2)
        # Commands that other tests kill leave some while `clean` looks.
        patch.setattr("orchestrator.workspace.files.abandoned_folders", lambda: [])
        patch.chdir(folder)
        Path("texts.jsonl").write_text(lines_of(help_texts(60)))
        workspace = open_workspace(folder / "whole")
        _fill(workspace)
        gc.freeze()  # What is collected below is then little.
        yield Copies(workspace.root)
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # The modules, as before: see the hooks of all tests.


def _fill(workspace: Workspace) -> None:
    for name in ("pretrain", "influence", "evaluate", "export", "benchmark"):
        assert cli.main([*COMMANDS[name], "--workspace", str(workspace.root)]) == 0
    next(workspace.exports.iterdir()).rename(workspace.exports / "full")
    run_job(_run_to_continue(workspace, "first", "training.num_steps=1"))
    settings = read_settings(None, SETTINGS)
    context = Context(workspace)
    teacher = newest_checkpoint(workspace.runs / "full")
    with suppress(KeyboardInterrupt):
        schedule = IterationSchedule((0, 0))
        stopped = Context(workspace, Notes(3))
        evaluate_model(open_model(teacher, schedule=schedule), settings.evaluation, stopped)
    os.utime(next(workspace.evaluations.glob("*.answers")), (0, 0))  # Else it runs.

    influence = load_influence_table(teacher)
    folder = workspace.sweeps / "s"
    assert influence
    tables = {TEACHER: influence}
    swept = SweptModels.of(settings)
    plan = trials_of_teachers(settings, swept, workspace, {TEACHER: teacher}, tables, name="s")
    plan.write(folder / PLAN_FILE)
    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    results = [result for trial in plan.trials if (result := run_trial(trial))]
    results = with_costs(results, plan, folder, settings, context.progress)
    found = StoredSweep(name="s", key=plan.key, results=tuple(results), influence=influence)
    journal = Journal(folder)
    journal.event("finished")
    journal.close()
    Picked(
        sweep="s", checkpoint=str(results[-1].checkpoint), schedule="0,0", time=time.time()
    ).write(workspace.picked)

    settings = read_settings(None, [*SETTINGS, "sweep.kind=search", "search.num_trials=1"])
    plan = trials_of_teachers(settings, swept, workspace, {TEACHER: teacher}, tables, name="search")
    search = make_search(settings, workspace, plan, teacher)
    search.open({})
    assert search.suggest()

    race = ["sweep.kind=iterations", "sweep.iterations=[1]", "sweep.methods=[iiet]"]
    rates = ["sweep.asha=true", "sweep.learning_rates={iiet: [1e-3, 2e-3]}"]
    settings = read_settings(None, [*SETTINGS, *race, *rates])
    plan = trials_from_scratch(settings, workspace, Path(plan.tokens_folder))
    stop_early(plan.trials[0], plan.trials[1], settings.sweep, 2)

    _sync(workspace, Notes())  # Makes the database.
    found.store(workspace)


def _call(read: Reader, workspace: Workspace) -> tuple[int, Any, str]:
    """Call a function; return a command's exit code for it, its answer, and its words."""
    notes = Notes()
    try:
        code = 0
        answer = read(workspace, notes)
    except (UserError, RunFailed, OSError) as error:
        code = 2
        answer = None
        notes.words.append(str(error))
    return code, answer, "\n".join(notes.words)


def _ask(copies: Copies, name: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    """Run a command; return its exit code, its answer without sizes and times, and its words."""
    capfd.readouterr()
    if name in FUNCTIONS:
        code, answer, said = _call(FUNCTIONS[name], Workspace(copies.root))
        return code, str(answer).replace(str(copies.root), ""), said
    words = [str(copies.root / w) if w == "exports/full" else w for w in COMMANDS[name]]
    code = cli.main([*words, "--workspace", str(copies.root)])
    printed = capfd.readouterr()
    is_json = printed.out[:1] == "{"
    said = str(_timeless(json.loads(printed.out))) if is_json else printed.out
    return code, said.replace(str(copies.root), ""), said + printed.err


TIMELY = ("bytes", "changed", "free_disk")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMELY}
    return sorted(map(_timeless, value), key=str) if isinstance(value, list) else value


def _harms(pattern: str, number: int, *, is_long: bool) -> list[str]:
    """Return in which ways a file is damaged for its reader of this number."""
    harms = [
        harm
        for harm in HARMS
        if (harm not in ("nested", "foreign") or not pattern.endswith(NO_JSON))
        and (harm != "flipped" or pattern.endswith(NO_JSON) or WITH_DIGEST.search(pattern))
    ]
    usual = {harms[(list(READERS).index(pattern) + number) % len(harms)]} if number < 2 else set()
    usual |= {"cut"} if number == 0 else set()
    return [harm for harm in harms if (harm in usual) != is_long]


def _problem(
    copies: Copies, pattern: str, harm: str, name: str, capfd: pytest.CaptureFixture[str]
) -> str:
    """Damage a file for a reader, and return what is wrong with its answer."""
    copies.restore(exports=name == "import")
    path = min(copies.root.glob(pattern))
    HARMS[harm](path)
    if harm == "nested":
        gc.collect()
    gc.disable()  # A finalizer that ran deep inside a parser's recursion would fail by it.
    try:
        code, answer, words = _ask(copies, name, capfd)
    finally:
        gc.enable()
    is_named = path.name in "".join(words.split())
    is_named |= any(said in words for said in SAID_OTHERWISE.get(pattern, ()))
    if harm in ("missing", "a folder"):
        is_named |= any(said in words for said in SAID.get(pattern, ()))
    is_right = code == 0 and (answer == copies.usual[name] or is_named)
    folder = "/".join(path.parts[-3:-1])
    is_one_sentence = code in (1, 2) and (is_named or folder in words) and len(words) < 1000
    log = "".join(words.partition("The traceback is in ")[2].split())
    if not log and (is_right or is_one_sentence):
        return ""
    usual = str(copies.usual[name])
    new = [line for line in words.splitlines() if line.strip(" ,") not in usual]
    found = f"{pattern} {harm}: {name} ended with {code}: {new or words}"
    return found + (Path(log).read_text()[-1500:] if log else "")


@pytest.mark.parametrize("pattern", READERS)
@pytest.mark.parametrize(
    "is_long",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.long)],
)
def test_each_damage_is_harmless_or_named(pattern, is_long, copies, capfd):
    problems = []
    for number, name in enumerate(READERS[pattern]):
        if name not in copies.usual:
            copies.restore(exports=name == "import")
            code, copies.usual[name], words = _ask(copies, name, capfd)
            assert code == 0, words
        for harm in _harms(pattern, number, is_long=is_long):
            problems.append(_problem(copies, pattern, harm, name, capfd))
    assert not any(problems), "\n".join(filter(None, problems))
