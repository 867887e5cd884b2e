"""Whole commands at a tiny size: those that are interrupted in a process of their own, the others
in this one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil
import pytest
import torch
from commands import Started, run_command, run_here, settings_options
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from small_size import SMALL
from transformers import AutoModelForCausalLM

from orchestrator.models.load import load_model
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow


def small(command: str, *more: str) -> list[str]:
    """Return `--set` options of a command for the small size."""
    return settings_options([*SMALL, *more], command)


@pytest.fixture(scope="module")
def finished(small_sweep, tmp_path_factory) -> tuple[Path, str]:
    """A workspace after a whole sweep on text, and the output of the command."""
    workspace = shutil.copytree(small_sweep, tmp_path_factory.mktemp("whole-job") / "workspace")
    return workspace, small_sweep.with_suffix(".txt").read_text()


def results_of(workspace: Path) -> list[dict[str, Any]]:
    [file] = workspace.glob("sweeps/*/results.json")
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def runs(workspace: Path) -> list[Run]:
    """Return what MLflow's pages would show."""
    if not (workspace / "mlflow.db").exists():
        return []
    try:
        client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(ids, max_results=100))
    except MlflowException:
        return []  # The tables are being made.


def kind(run: Run) -> str:
    return str(run.data.tags["iiet.kind"])


def losses(workspace: Path, run: Run) -> list[int]:
    """Return the steps of a run's losses in MLflow."""
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    return [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]


def test_a_sweep_ends_with_a_front_in_its_folder_and_in_mlflow(finished):
    workspace, printed = finished
    for word in ("vanilla", "r = 0", "teacher", "iiet-orch ui", "front.html"):
        assert word in printed
    [folder] = (workspace / "sweeps").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "results.json", "settings.yaml"} <= names
    assert {f"front.{end}" for end in ("png", "svg", "json", "csv", "html")} <= names
    results = results_of(workspace)
    assert [r["role"] for r in results] == ["teacher", *["trial"] * 3, *["baseline"] * 2]
    expected = {f"quality/{name}" for name in ("accuracy", "accuracy_stderr", "bits_per_byte")}
    expected |= {f"cost/{name}" for name in ("flops_per_token", "kv_bytes_per_token")}
    for result in results:
        assert expected <= set(result["numbers"])
        assert result["numbers"]["cost/decode_ms_per_token"] > 0
    trials = [result for result in results if result["role"] == "trial"]
    evaluations = [result["numbers"]["cost/evaluations"] for result in trials]
    assert (evaluations[0], evaluations[-1]) == (9, 3)

    tracked = runs(workspace)
    assert {run.info.status for run in tracked} == {"FINISHED"}
    kinds = [kind(run) for run in tracked]
    assert [kinds.count(word) for word in ("sweep", "trial", "pretrain", "influence")] == [
        *(1, 3, 0, 1)
    ]
    sweep = tracked[kinds.index("sweep")]
    parents = [run.data.tags.get("mlflow.parentRunId") for run in tracked]
    assert parents.count(sweep.info.run_id) == 6
    assert "front/front." in sweep.data.tags["mlflow.note.content"]
    # Only the claims that the sweep answers are shown; none of them needs PCformer.
    claims = json.loads((folder / "front.json").read_text())["claims"]
    assert {"iiet_over_vanilla", "iiet_over_r_0"} <= {claim["key"] for claim in claims}
    assert {claim["number"] for claim in claims} <= {1, 3, 4}
    for claim in claims:
        assert f"claims/{claim['key']}" in sweep.data.metrics
        assert f"{claim['number']} {claim['text']}: {claim['about']}."[:60] in printed
    trial = tracked[kinds.index("trial")]
    assert {"schedule", "r_01", "threshold"} <= set(trial.data.params)
    assert {"quality/accuracy", "cost/flops_per_token", "train/loss"} <= set(trial.data.metrics)
    assert len(losses(workspace, trial)) == 3


def test_a_copy_of_the_workspace_finds_everything_and_names_its_own_place(small_sweep, tmp_path):
    copy = tmp_path / "a new place"
    shutil.copytree(small_sweep, copy, copy_function=shutil.copy)  # With new times, as cp gives.
    naming = [
        path
        for path in copy.rglob("*")
        if path.is_file() and path.suffix != ".db" and "logs" not in path.relative_to(copy).parts
        if str(small_sweep).encode() in path.read_bytes()
    ]
    assert naming == []
    # The commands run in other processes, because MLflow keeps open what it has read.
    place = ("--workspace", str(copy))
    assert "6 of 6 trials" in run_command("sweep", "toy", *small("sweep"), "--dry-run", *place)
    reported = "".join(run_command("report", *place).split())
    assert str(copy).replace(" ", "") in reported
    run_command("ui", "--sync", "--replace", *place)
    run_command("pick", "--best", *place)
    uri = f"sqlite:///{copy}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    [model] = client.search_registered_models()
    places = [client.get_model_version_by_alias(model.name, a).source for a in model.aliases]
    for run in runs(copy):
        files = client.list_artifacts(run.info.run_id, "front")
        places += [f"{run.info.artifact_uri}/{file.path}" for file in files]
    paths = [Path(unquote(urlsplit(place).path)) for place in places]
    assert len(paths) > 5
    assert all(path.exists() and path.is_relative_to(copy) for path in paths), paths


def test_reading_results_imports_nothing_that_trains_measures_or_publishes(finished):
    workspace, _ = finished
    name = next((workspace / "sweeps").iterdir()).name
    commands = [
        ["config", "show", "toy"],
        ["list", "--json"],
        ["list", "running", "--json"],
        ["pick", "--dry-run", "--best"],
        ["report", name],
        ["sweep", "toy", *small("sweep")],
    ]
    heavy = {"torch", "ray", "mlflow", "lm_eval", "datasets", "transformers", "optuna"}
    code = (
        "import os, sys; from orchestrator.cli import main\n"
        f"os.environ['IIET_WORKSPACE'] = {str(workspace)!r}\n"
        f"for words in {commands}:\n"
        "    assert main(words) == 0, words\n"
        f"    loaded = {heavy} & {{*sys.modules}}\n"
        "    assert not loaded, (words, loaded)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert "all trials" in printed
    assert printed.count(f"report: {workspace}/sweeps/{name}/front.html") == 2
    assert printed.count(f"picture: {workspace}/sweeps/{name}/front.png") == 2


def test_later_commands_reuse_what_the_sweep_trained_and_measured(finished, ray_session):
    workspace, first_output = finished

    def times(pattern: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workspace.glob(pattern)}

    def table(printed: str) -> list[str]:
        """Return the rows of the front's table, including times, which are measured once."""
        rows = printed.partition("ms/token")[2].partition("report:")[0].splitlines()
        assert [row for row in rows if row.split()[:1] == ["teacher"]], printed
        return rows

    weights = times("**/model.safetensors")
    measured = times("evaluations/*")
    second_output = run_here("sweep", "toy", *small("sweep"), workspace=workspace)
    assert "found again" in second_output
    assert table(second_output) == table(first_output)
    fewer = small("sweep-threshold", "sweep.num_schedules=2")
    plan = run_here("sweep-threshold", "--dry-run", *fewer, workspace=workspace)
    assert "3 of 3 trials" in plan
    folders = [str(workspace / result["checkpoint"]) for result in results_of(workspace)]
    assert "found again" in run_here("evaluate", *folders, *small("evaluate"), workspace=workspace)
    assert times("**/model.safetensors") == weights
    run_here("export", folders[1], *small("export"), workspace=workspace)
    run_here("pick", "--best", workspace=workspace)
    assert times("evaluations/*") == measured
    exported = times("**/model.safetensors")
    run_here(
        "sweep-threshold", *small("sweep-threshold", "evaluation.limit=5"), workspace=workspace
    )
    assert len(times("evaluations/*")) > len(measured), "another suite is measured"
    assert times("**/model.safetensors") == exported, "without training"
    influence = run_here(
        "influence", "--metric", "relative", *small("influence"), workspace=workspace
    )
    assert "correction 2" in influence
    assert "lastword" in run_here(
        "evaluate", "--schedule", "1", *small("evaluate"), workspace=workspace
    )
    distilled = run_here(
        "distill", "-r", "1,0,1", "--local", *small("distill"), workspace=workspace
    )
    assert "checkpoint:" in distilled


def test_the_worse_of_two_learning_rates_is_stopped_early(tmp_path, ray_session):
    rates = "sweep.learning_rates={vanilla: [1.0e-2, 1.0e-5]}"
    options = small("sweep-iterations", "sweep.methods=[vanilla]", rates, "sweep.trials_at_once=1")
    plan = run_here("sweep-iterations", "--asha", "--dry-run", *options, workspace=tmp_path)
    assert "0.25, 0.5 of the steps (ASHA)" in plan
    printed = run_here("sweep-iterations", "--asha", *options, workspace=tmp_path)
    assert "vanilla, rate 1e-05 stopped early at step 6" in printed
    assert "2 trials, 1 stopped early" in printed


def interrupted(process: Started) -> str:
    """Send Ctrl-C, check that all processes end, and return what the command printed."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130, printed
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {alive}"
    return printed


def sweep_of_two(num_steps: int) -> list[str]:
    """Return the words of a sweep of two trials, one after the other."""
    return [
        "sweep-iterations",
        *small(
            "sweep-iterations",
            "sweep.methods=[vanilla, iiet]", "sweep.iterations=[1]", "sweep.trials_at_once=1",
            f"training.num_steps={num_steps}", "training.checkpoint_every_steps=20",
            f"training.validate_every_steps={num_steps // 2}",
        ),
    ]  # fmt: skip


def wait_for_second_trial(sweep: Started, workspace: Path) -> None:
    """Wait until one trial is finished, and another one has a checkpoint."""

    def has_come() -> bool:
        finished = {path.parent for path in workspace.glob("runs/*/done.json")}
        saved = {path for path in workspace.glob("runs/*") if find_checkpoints(path)}
        return bool(finished and saved - finished)

    sweep.wait_for(has_come)


def ends_from_where_it_was(sweep: list[str], workspace: Path) -> None:
    """Run a sweep again and check that it trained nothing twice."""
    finished = {path.parent for path in workspace.glob("runs/*/done.json")}
    newest = {p: find_checkpoints(p)[-1] for p in workspace.glob("runs/*") if find_checkpoints(p)}
    assert len(finished) < len(newest) == 2
    assert "of them found finished" in run_here(*sweep, workspace=workspace)
    assert len(list(workspace.glob("runs/*/done.json"))) == 2
    for folder, checkpoint in newest.items():
        records = read_journal(folder)[0]
        resumed = [r["path"] for r in records if r.get("name") == "resumed"]
        place = str(checkpoint.relative_to(workspace))
        assert resumed == ([] if folder in finished else [place])


def test_a_sweep_resumes_after_its_driver_is_killed(tmp_path, ray_session):
    # Many steps after the first checkpoint: who is killed must still train.
    sweep = sweep_of_two(num_steps=200)
    driver = Started(*sweep, "--workspace", str(tmp_path))
    wait_for_second_trial(driver, tmp_path)
    family = psutil.Process(driver.pid).children(recursive=True)
    # Ray Tune names its process around a trial so.
    trainers = [p for p in family if "ImplicitFunc" in " ".join(p.cmdline())]
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(trainers, timeout=60)
    assert trainers
    assert not alive, "who trains ends with the driver"
    ends_from_where_it_was(sweep, tmp_path)


PLAIN = (
    "data.source=depth", "data.depth.tasks=[phop_2]", "data.depth.length=16",
    "model.method=vanilla", "model.num_layers=6", "model.dim=16", "model.num_heads=2",
    "model.ffn_dim=32", "training.num_steps=40", "training.num_tokens_per_step=256",
    "training.warmup_steps=5", "distillation.training.num_steps=300",
    "distillation.training.num_tokens_per_step=256", "distillation.training.warmup_steps=5",
    "distillation.training.checkpoint_every_steps=20", "influence.num_tokens=256",
    "evaluation.num_items=40", "evaluation.retention={phop_2: 90}", "sweep.num_schedules=3",
    "sweep.trials_at_once=1",
)  # fmt: skip
"""A plain model of six layers, and students that leave up to three of them out."""


@pytest.mark.long
def test_a_plain_model_has_a_front_also_if_its_sweep_is_killed(tmp_path, ray_session):
    pretrain = ["pretrain", "--name", "plain", "--local", *settings_options(PLAIN, "pretrain")]
    run_here(*pretrain, workspace=tmp_path)
    sweep = ["sweep-threshold", "plain", "--name", "front"]
    sweep += settings_options(PLAIN, "sweep-threshold")

    def finished_trainings() -> dict[Path, float]:
        """Return folder of a finished training -> when it ended."""
        ends = tmp_path.glob("trials/*/done.json")
        return {path.parent: path.stat().st_mtime for path in ends}

    def one_trains_after_another() -> bool:
        saved = {path for path in tmp_path.glob("trials/*") if find_checkpoints(path)}
        return bool(finished_trainings() and saved - finished_trainings().keys())

    driver = Started(*sweep, "--workspace", str(tmp_path))
    driver.wait_for(one_trains_after_another)
    driver.kill()
    driver.communicate()
    before = finished_trainings()
    printed = run_here(*sweep, workspace=tmp_path)
    after = finished_trainings()
    assert len(before) < len(after) == 4, "three students, and the teacher trained further"
    assert before.items() <= after.items(), "nothing is trained twice"
    resumed = [
        record["path"]
        for folder in after.keys() - before.keys()
        for record in read_journal(folder)[0]
        if record.get("name") == "resumed"
    ]
    assert len(resumed) == 1, "one goes on where it was"
    for word in ("retention", "kept", "teacher, trained further", "x,"):
        assert word in printed

    # The smallest is a plain model of transformers, without code.
    [smallest] = [r for r in results_of(tmp_path) if r["model"]["num_layers"] == 3]
    picked = tmp_path / "picked"
    run_here("pick", "front", "--cheapest", "--to", str(picked), workspace=tmp_path)
    assert not list(picked.glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(picked).eval()
    tokens = torch.arange(12).view(1, 12) % 5
    with torch.no_grad():
        expected = load_model(tmp_path / smallest["checkpoint"])(tokens)
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_killed_sweep_by_muon_ends_like_one_that_was_left_alone(tmp_path, ray_session):
    options = ["training.optimizer=muon", "training.num_steps=100"]
    sweep = ["sweep", "toy", *small("sweep", *options, "training.checkpoint_every_steps=20")]
    alone = tmp_path / "alone"
    run_here(*sweep, workspace=alone)

    killed = tmp_path / "killed"
    driver = Started(*sweep, "--workspace", str(killed))
    driver.wait_for(
        lambda: any(
            find_checkpoints(folder) and not (folder / "done.json").exists()
            for folder in killed.glob("runs/*")
        )
    )
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    psutil.wait_procs(family, timeout=60)
    run_here(*sweep, workspace=killed)
    records = [record for folder in killed.glob("runs/*") for record in read_journal(folder)[0]]
    assert any(record.get("name") == "resumed" for record in records)

    def qualities(workspace: Path) -> dict[str, dict[str, float]]:
        return {
            row["label"]: {k: v for k, v in row["numbers"].items() if k.startswith("quality/")}
            for row in results_of(workspace)
        }

    assert qualities(killed) == qualities(alone)
    assert all(qualities(alone).values())


@pytest.mark.long
def test_a_sweep_is_watched_in_mlflow_interrupted_and_resumed(tmp_path, ray_session):
    sweep = sweep_of_two(num_steps=300)
    driver = Started(*sweep, "--workspace", str(tmp_path))
    wait_for_second_trial(driver, tmp_path)
    live = {"train/loss", "train/learning_rate", "train/tokens_per_second", "train/memory_gb"}
    watched: list[Run] = []

    def is_shown() -> bool:
        watched[:] = [run for run in runs(tmp_path) if run.info.status == "RUNNING"]
        return any(live <= run.data.metrics.keys() for run in watched)

    driver.wait_for(is_shown)
    printed = interrupted(driver)
    stopped = {
        folder: record["step"]
        for folder in tmp_path.glob("runs/*")
        for record in read_journal(folder)[0]
        if record.get("name") == "stopped"
    }
    [(folder, step)] = stopped.items()
    assert find_checkpoints(folder)[-1].name == f"step_{step:08}", "all of its steps are saved"
    assert re.search(rf"iiet-orch: interrupted; .* of 2 trials .*: saved at step {step};", printed)
    assert sorted(run.info.status for run in runs(tmp_path)) == ["FINISHED", "KILLED", "KILLED"]

    ends_from_where_it_was(sweep, tmp_path)
    runs_by_id = {run.info.run_id: run for run in runs(tmp_path)}
    assert {run.info.status for run in runs_by_id.values()} == {"FINISHED"}
    keys = [(kind(run), run.data.tags["iiet.key"]) for run in runs_by_id.values()]
    assert len(keys) == len(set(keys))
    for before in watched:
        resumed = runs_by_id[before.info.run_id]
        assert resumed.info.start_time == before.info.start_time
        if kind(resumed) != "sweep":
            assert "quality/accuracy" in resumed.data.metrics
            steps = losses(tmp_path, resumed)
            assert steps == sorted(set(steps))
