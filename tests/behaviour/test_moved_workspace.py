"""A workspace that was copied or moved works at its new place, and the original stays as it is."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import Started, run_command, settings_options
from mlflow import MlflowClient
from small_size import SMALL

from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.long

SETTINGS = settings_options(SMALL)
PAUSED = [
    "pretrain", "--local", "--name", "paused", *SETTINGS,
    "--set", "training.num_steps=300", "--set", "training.checkpoint_every_steps=20",
]  # fmt: skip

READ_MLFLOW = """
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
from mlflow import MlflowClient
uri = f"sqlite:///{sys.argv[1]}/mlflow.db"
client = MlflowClient(uri, registry_uri=uri)
[model] = client.search_registered_models()
places = [client.get_model_version_by_alias(model.name, a).source for a in model.aliases]
runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
for run in runs:
    files = client.list_artifacts(run.info.run_id, "front")
    places += [f"{run.info.artifact_uri}/{file.path}" for file in files]
for path in (Path(unquote(urlsplit(place).path)) for place in places):
    assert path.exists() and path.is_relative_to(sys.argv[1]), path
print(len(runs))
"""


def run(*arguments: str, workspace: Path, code: int = 0) -> str:
    return run_command(*arguments, "--workspace", str(workspace), code=code)


def num_tracked_runs(workspace: Path) -> int:
    """Return how many runs MLflow has; all of their files must lie in the workspace."""
    reading = Started(str(workspace), code=READ_MLFLOW)
    printed, _ = reading.communicate()
    assert reading.returncode == 0, printed
    return int(printed)


def contents(workspace: Path) -> dict[Path, bytes]:
    """Return every file, without the logs."""
    files = {path.relative_to(workspace): path for path in workspace.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.parts[0] != "logs"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished sweep, a registered model and an interrupted training."""
    workspace = tmp_path_factory.mktemp("original")
    run("sweep", "toy", *SETTINGS, workspace=workspace)
    run("pick", "--best", workspace=workspace)
    process = Started(*PAUSED, "--workspace", str(workspace))
    while not find_checkpoints(workspace / "runs" / "paused"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    return workspace


def test_a_copy_goes_on_and_the_original_stays(original: Path, tmp_path: Path) -> None:
    before, num_runs = contents(original), num_tracked_runs(original)
    place = str(original).encode()
    naming = [name for name, data in before.items() if name.suffix != ".db" and place in data]
    assert naming == []
    there = tmp_path / "a new place"
    shutil.copytree(original, there, copy_function=shutil.copy)  # With new times, as cp gives.
    goes_on(there, num_runs)
    run("pick", "--cheapest", workspace=there)
    finished = {path: path.stat().st_mtime for path in there.glob("*/*/done.json")}
    printed = run("sweep", "toy", *SETTINGS, workspace=there)
    assert "6 trials, 6 of them found finished" in printed
    assert {path: path.stat().st_mtime for path in there.glob("*/*/done.json")} == finished
    assert num_tracked_runs(there) == num_runs
    assert contents(original) == before


def test_a_moved_workspace_goes_on(original: Path, tmp_path: Path) -> None:
    num_runs = num_tracked_runs(original)
    goes_on(Path(shutil.move(original, tmp_path / "a new place")), num_runs)


def goes_on(there: Path, num_runs: int) -> None:
    """Report the sweep, resume the interrupted training, and make MLflow's database anew, after
    `sync` has named what would be lost."""
    [page] = there.glob("sweeps/*/front.html")
    assert str(page) in " ".join(run("report", workspace=there).split())
    paused = there / "runs" / "paused"
    stopped_at = [record["step"] for record in read_journal(paused)[0] if "step" in record][-1]
    run(*PAUSED, workspace=there)
    events = [record for record in read_journal(paused)[0] if record["kind"] == "event"]
    assert [event["step"] for event in events if event["name"] == "resumed"] == [stopped_at]
    assert events[-1]["name"] == "finished"

    client = MlflowClient(f"sqlite:///{there}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "iiet-orch"]
    noted = client.search_runs([experiment.experiment_id], "tags.`iiet.kind` = 'pretrain'")[0]
    client.set_tag(noted.info.run_id, "reviewer", "ann")
    said = " ".join(run("sync", workspace=there, code=2).split())
    assert "`iiet-orch sync --replace` makes it anew" in said
    assert f"Lost with it: the tag reviewer of {noted.info.run_name}" in said
    run("sync", "--replace", workspace=there)
    assert num_tracked_runs(there) == num_runs
