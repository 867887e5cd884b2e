"""Each command, disturbed in each way, ends like one that was left alone.

The cells are rows of `COMMANDS` times columns of `DISTURBANCES`. In each must hold that the
command, given again, succeeds, and leaves in the workspace what the undisturbed one leaves: the
same files of tokens, weights and measured values, the same qualities of a sweep and the same runs
in MLflow, and no others. Trainings have a finer table in `test_disturbed_runs.py`. Ray is pretended
here; a sweep's driver and its workers are disturbed in `test_end_to_end.py` and
`test_sweep_outages.py`.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Started
from lm_eval_tasks import write_choices
from mlflow import MlflowClient
from pretended_ray import idle_ray, run_trials_here
from same_run import small_files
from sample_trials import sample_trial

from orchestrator import cli
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.layout import open_workspace

pytestmark = pytest.mark.slow

COMMANDS = {
    "prepare": ["prepare"],
    "pretrain": ["pretrain", "--local", "--name", "second", "--set", "training.seed=1"],
    "evaluate": ["evaluate", "first"],
    "sweep": ["sweep-threshold", "first", "--name", "front", "--schedules", "2"],
    "export": ["export", "first", "--no-measure"],
    "pick": ["pick", "kept", "--cheapest"],
    "clean": ["clean", "checkpoints", "--yes"],
    "ui": ["ui", "--sync", "--replace"],
}
RESULTS = ("*.bin", "*.safetensors", "items.json", "config.json")
"""Names of the files that a command makes for people, without times or places in them."""

Command = Callable[[Path], list[str]]
"""Returns the words of the command for a workspace."""
SETTINGS = """
data: {{source: files, files: ["{folder}/texts.txt"], vocab_size: 300, validation_fraction: 0.2}}
model:
  {{dim: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, ffn_dim: 32, context_length: 16}}
training:
  {{num_steps: 4, num_tokens_per_step: 64, num_validation_tokens: 64, checkpoint_every_steps: 2}}
evaluation: {{suite: choices, include_path: "{folder}/tasks"}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with texts, settings, and a workspace with a run and a sweep."""
    folder = tmp_path_factory.mktemp("project")
    texts = [f"Text {i} says that the sea has {i * 13} kinds of fish." for i in range(100)]
    (folder / "texts.txt").write_text("<|endoftext|>".join(texts))
    write_choices(folder / "tasks", "choices", ["a b", "the sea", "fish"])
    (folder / "settings.yaml").write_text(SETTINGS.format(folder=folder))
    workspace = open_workspace(folder / "workspace")
    assert cli.main(words_of(folder, "pretrain", "--local", "--name", "first")(workspace.root)) == 0
    (checkpoint,) = (workspace.runs / "first").glob("step_00000004")
    StoredSweep(
        name="kept",
        key="kept",
        results=tuple(
            sample_trial(
                key=role, label=role, role=role, schedule=(1, 1), cost={"evaluations": cost},
                quality={"accuracy": accuracy}, checkpoint=str(checkpoint),
            )
            for role, cost, accuracy in (("teacher", 4, 0.5), ("trial", 3, 0.499))
        ),
    ).store(workspace)  # fmt: skip
    return folder


def words_of(folder: Path, *words: str) -> Command:
    takes_settings = words[0] in ("prepare", "pretrain", "evaluate", "export")
    config = ["--config", str(folder / "settings.yaml")] if takes_settings else []
    return lambda workspace: [*words, *config, "--workspace", str(workspace)]


def results_in(workspace: Path) -> dict[str, str]:
    """Return the results of a workspace: digests of files, qualities of a sweep, states of runs.

    Keys are the file's path in the workspace, the sweep's with a label, and the key in MLflow.
    """
    results = {
        str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in RESULTS
        for path in workspace.rglob(pattern)
        if "artifacts" not in path.relative_to(workspace).parts
    }
    for path in workspace.glob("sweeps/*/results.json"):
        for row in json.loads(path.read_text())["results"]:
            qualities = {k: v for k, v in row["numbers"].items() if k.startswith("quality/")}
            results[f"{path.parent.name}: {row['label']}"] = str(qualities)
    database = workspace / "mlflow.db"
    if database.is_file():
        client = MlflowClient(f"sqlite:///{database}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in client.search_runs(experiments):
            results[f"MLflow: {run.data.tags['iiet.key']}"] = run.info.status
    return results


def run(command: Command, workspace: Path) -> int:
    """Run the command and return its exit code; in a process of its own if it deletes a store,
    because MLflow keeps an opened one until the process ends."""
    words = command(workspace)
    if "--replace" not in words:
        return cli.main(words)
    most_bytes, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = Started(str(most_bytes), *words, code=RUN_WITH_FILES_OF)
    process.communicate()
    return process.returncode


RUN_WITH_FILES_OF = """
import resource, sys
from orchestrator.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def retried(command: Command, workspace: Path, _: pytest.MonkeyPatch) -> Path:
    assert run(command, workspace) == 0
    return workspace


def killed(at: int, command: Command, workspace: Path, _: pytest.MonkeyPatch) -> Path:
    """Kill the command when it is about to give a file its name for the `at`-th time."""
    process = Started(str(at), *command(workspace), code=RUN_UNTIL_KILLED)
    printed, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), printed
    return workspace


RUN_UNTIL_KILLED = """
import itertools, os, signal, sys
import pytest
from pretended_ray import idle_ray, run_trials_here
from orchestrator.cli import main

patch = pytest.MonkeyPatch()
idle_ray(patch)
run_trials_here(patch)
numbers = itertools.count(1)

def hook(name, arguments):
    if name == "os.rename" and next(numbers) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
sys.exit(main(sys.argv[2:]))
"""


def run_by_two(command: Command, workspace: Path, _: pytest.MonkeyPatch) -> Path:
    """Start the command twice at once; of a sweep, one may be refused, as the other runs."""
    processes = [Started("0", *command(workspace), code=RUN_UNTIL_KILLED) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    refused = 2 if "sweep-threshold" in command(workspace) else 0
    codes = sorted(process.returncode for process in processes)
    assert codes in ([0, 0], [0, refused]), printed
    return workspace


def moved(command: Command, workspace: Path, _: pytest.MonkeyPatch) -> Path:
    assert run(command, workspace) == 0
    return workspace.rename(workspace.with_name("elsewhere"))


def on_a_full_disk(command: Command, workspace: Path, _: pytest.MonkeyPatch) -> Path:
    with small_files():
        run(command, workspace)  # It may fail, but raises nothing.
    return workspace


def clock_set_back(command: Command, workspace: Path, patch: pytest.MonkeyPatch) -> Path:
    assert run(command, workspace) == 0
    now = time.time
    patch.setattr(time, "time", lambda: now() - 24 * 3600)
    return workspace


DISTURBANCES = {
    "retried": retried,
    "killed at its first file": partial(killed, 1),
    "killed later": partial(killed, 4),
    "run by two": run_by_two,
    "moved": moved,
    "on a full disk": on_a_full_disk,
    "the clock set back": clock_set_back,
}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Callable[[str], dict[str, str]]:
    """A function that returns the results of a command that nothing disturbs."""
    known: dict[str, dict[str, str]] = {}

    def results_of(name: str) -> dict[str, str]:
        if name not in known:
            workspace = start_of(name, folder, tmp_path_factory.mktemp("alone"))
            before = results_in(workspace)
            assert run(words_of(folder, *COMMANDS[name]), workspace) == 0
            known[name] = results_in(workspace)
            assert known[name] != before
        return known[name]

    return results_of


def start_of(name: str, folder: Path, target: Path) -> Path:
    """Return a workspace in which a command has not run yet."""
    workspace = target / "workspace"
    if name == "prepare":
        workspace.mkdir()
    else:
        shutil.copytree(folder / "workspace", workspace)
    if name == "ui":
        (workspace / "mlflow.db").unlink()
    return workspace


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_like_one_that_was_left_alone(
    name, disturbance, folder, undisturbed, tmp_path, monkeypatch
):
    idle_ray(monkeypatch)
    run_trials_here(monkeypatch)
    expected = undisturbed(name)
    command = words_of(folder, *COMMANDS[name])
    workspace = DISTURBANCES[disturbance](command, start_of(name, folder, tmp_path), monkeypatch)
    assert run(command, workspace) == 0
    assert results_in(workspace) == expected
