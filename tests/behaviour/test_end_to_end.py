"""Whole commands at a tiny size: those that are interrupted in a process of their own, the others
in this one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import psutil
import pytest
from commands import Started, run_command, settings_options
from small_size import SMALL

from orchestrator import cli
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow


def small(*more: str) -> list[str]:
    """Return `--set` options for the small size."""
    return settings_options([*SMALL, *more])


def run(*arguments: str, workspace: Path) -> str:
    """Run a command in a process of its own and return its output."""
    return run_command(*arguments, "--workspace", str(workspace))


def answer(*arguments: str, workspace: Path) -> str:
    """Run a command in this process, and return its output."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        code = cli.main([*arguments, "--workspace", str(workspace)])
    assert code == 0, out.getvalue() + _newest_log(workspace)
    return out.getvalue()


def _newest_log(workspace: Path) -> str:
    logs = sorted((workspace / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    return f"\n--- {logs[-1].name}\n{logs[-1].read_text()[-4000:]}" if logs else ""


@pytest.fixture(scope="module")
def finished(small_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace after a whole sweep on text, and the output of the command."""
    workspace = shutil.copytree(small_sweep, tmp_path_factory.mktemp("whole-job") / "workspace")
    return workspace, small_sweep.with_suffix(".txt").read_text()


def test_a_sweep_ends_with_a_front(finished: tuple[Path, str]) -> None:
    workspace, printed = finished
    for word in ("vanilla", "r = 0", "teacher", "iiet-orch ui", "front.html"):
        assert word in printed
    folder = next((workspace / "sweeps").iterdir())
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "results.json", "settings.yaml"} <= names
    assert {f"front.{kind}" for kind in ("png", "svg", "json", "csv", "md", "html")} <= names
    results = json.loads((folder / "results.json").read_text())["results"]
    roles = [result["role"] for result in results]
    assert roles == ["teacher", "trial", "trial", "trial", "baseline", "baseline"]
    for result in results:
        expected = {f"quality/{n}" for n in ("accuracy", "accuracy_stderr", "bits_per_byte")}
        expected |= {f"cost/{n}" for n in ("evaluations", "flops_per_token", "kv_bytes_per_token")}
        assert expected <= set(result["numbers"])
        assert result["numbers"]["cost/decode_ms_per_token"] > 0
    evaluations = [r["numbers"]["cost/evaluations"] for r in results if r["role"] == "trial"]
    assert evaluations[0] == 9
    assert evaluations[-1] == 3
    assert "teacher: answers for " in printed
    trials = [r for r in results if r["role"] == "trial"]
    journals = [workspace / Path(r["checkpoint"]).parent / "journal.jsonl" for r in trials]
    assert all('"reads_teacher": true' in journal.read_text() for journal in journals)
    assert not list((workspace / "teachers").glob("*/")), "and not kept behind the sweep"


def test_a_copy_of_the_workspace_finds_everything_again(small_sweep: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_sweep, tmp_path / "copy")
    naming = [
        path
        for path in copy.rglob("*")
        if path.is_file() and path.suffix != ".db" and "logs" not in path.relative_to(copy).parts
        if str(small_sweep).encode() in path.read_bytes()
    ]
    assert naming == []
    plan = answer("sweep", "toy", *small(), "--dry-run", workspace=copy)
    assert "6 of 6 trials are finished" in plan
    assert str(copy) in "".join(answer("report", workspace=copy).split())


def test_mlflow_holds_the_sweep_and_its_trials(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    script = (
        "import sys; from mlflow import MlflowClient\n"
        "client = MlflowClient(f'sqlite:///{sys.argv[1]}/mlflow.db')\n"
        "ids = [e.experiment_id for e in client.search_experiments()]\n"
        "runs = client.search_runs(ids, max_results=100)\n"
        "kinds = [run.data.tags.get('iiet.kind') for run in runs]\n"
        "[sweep] = [run for run in runs if run.data.tags.get('iiet.kind') == 'sweep']\n"
        "parent = 'mlflow.parentRunId'\n"
        "children = [r for r in runs if r.data.tags.get(parent) == sweep.info.run_id]\n"
        "trial = next(r for r in children if r.data.tags['iiet.kind'] == 'trial')\n"
        "losses = client.get_metric_history(trial.info.run_id, 'train/loss')\n"
        "files = [f.path for f in client.list_artifacts(sweep.info.run_id, 'front')]\n"
        "import json; print(json.dumps({'kinds': kinds, 'children': len(children),\n"
        "  'note': sweep.data.tags['mlflow.note.content'], 'files': files, 'losses': len(losses),\n"
        "  'status': sorted({r.info.status for r in runs}), 'params': trial.data.params,\n"
        "  'metrics': sorted(trial.data.metrics)}))\n"
    )
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(workspace)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["kinds"].count("trial") == 3
    assert found["kinds"].count("pretrain") == 3
    assert found["kinds"].count("influence") == 1
    assert found["children"] == 6
    assert found["status"] == ["FINISHED"]
    assert found["losses"] == 3
    assert "front/front." in found["note"]
    assert {f"front/front.{kind}" for kind in ("png", "html", "json", "csv")} <= set(found["files"])
    assert {"schedule", "r_01", "threshold"} <= set(found["params"])
    assert {"quality/accuracy", "cost/flops_per_token", "train/loss"} <= set(found["metrics"])


def test_a_rerun_reuses_everything(finished: tuple[Path, str], ray_session: None) -> None:
    workspace, first = finished
    before = _checkpoints(workspace)
    second = answer("sweep", "toy", *small(), workspace=workspace)
    assert "found again" in second
    assert _checkpoints(workspace) == before, "nothing was trained again"
    assert _table(second) == _table(first)


def test_other_thresholds_reuse_equal_trials(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    options = small("sweep.num_schedules=2")
    plan = answer("sweep-threshold", "--dry-run", *options, workspace=workspace)
    assert "5 of 5 trials are finished and reused" in plan


def test_what_the_sweep_measured_is_not_measured_again(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    folder = next((workspace / "sweeps").iterdir())
    results = json.loads((folder / "results.json").read_text())["results"]
    before = {path: path.stat().st_mtime_ns for path in (workspace / "evaluations").iterdir()}
    folders = [str(workspace / result["checkpoint"]) for result in results]
    assert "found again" in answer("evaluate", *folders, *small(), workspace=workspace)
    answer("export", folders[1], *small(), workspace=workspace)
    answer("pick", "--best", workspace=workspace)
    after = {path: path.stat().st_mtime_ns for path in (workspace / "evaluations").iterdir()}
    assert after == before


def test_another_suite_measures_without_training(
    finished: tuple[Path, str], ray_session: None
) -> None:
    workspace, _ = finished
    before, num_before = _checkpoints(workspace), len(list((workspace / "evaluations").iterdir()))
    answer("sweep-threshold", *small("evaluation.limit=5"), workspace=workspace)
    assert _checkpoints(workspace) == before
    assert len(list((workspace / "evaluations").iterdir())) > num_before


@pytest.mark.long
def test_distilled_baselines_stand_beside_the_front(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    arguments = ["sweep-threshold", "--distilled-baselines", "vanilla,fewer_layers"]
    arguments += ["--name", "fair", *small()]
    plan = run(*arguments, "--dry-run", workspace=workspace)
    labels = ["vanilla, 3 layers, distilled", "1 of 3 layers", "2 of 3 layers"]
    assert all(label in plan for label in labels), plan
    assert "3 distinct schedules; 4 distilled baselines" in plan
    run(*arguments, workspace=workspace)
    again = run(*arguments, "--dry-run", workspace=workspace)
    assert "10 of 10 trials are finished and reused" in again
    folder = workspace / "sweeps" / "fair"
    table = (folder / "front.md").read_text()
    assert all(word in table for word in ("parameters", *labels)), table
    results = json.loads((folder / "results.json").read_text())["results"]
    distilled = {r["label"]: r for r in results if r["role"] == "baseline" and r["parent"]}
    assert len(distilled) == 4
    students = [result for result in results if result["role"] == "trial"]
    cost = {label: r["numbers"]["cost/flops_per_token"] for label, r in distilled.items()}
    assert cost[labels[0]] == pytest.approx(
        students[-1]["numbers"]["cost/flops_per_token"], rel=0.05
    )
    journals = {
        label: (workspace / Path(r["checkpoint"]).parent / "journal.jsonl").read_text()
        for label, r in distilled.items()
    }
    assert all("train/kl" in journal for journal in journals.values())
    rows = json.loads((folder / "front.json").read_text())
    assert "1 of 3 layers" in (folder / "front.html").read_text()
    assert "1 of 3 layers" in json.dumps(rows)
    picked = run("pick", "fair", "--cheapest", "--dry-run", workspace=workspace)
    assert " layers" not in picked, "a baseline is never picked"


def test_commands_run_one_by_one(finished: tuple[Path, str], ray_session: None) -> None:
    workspace, _ = finished
    influence = answer("influence", "--metric", "relative", *small(), workspace=workspace)
    assert "correction 2" in influence
    assert "lastword" in answer("evaluate", "--schedule", "1", *small(), workspace=workspace)
    assert "front.html" in answer("report", workspace=workspace)
    assert "checkpoint:" in answer("distill", "-r", "1,0,1", *small(), workspace=workspace)


def _checkpoints(workspace: Path) -> dict[str, float]:
    return {
        str(path.relative_to(workspace)): path.stat().st_mtime
        for path in workspace.rglob("model.safetensors")
    }


def _table(printed: str) -> list[str]:
    """Return the rows of the front's table, including times, which are measured once."""
    rows = printed.partition("ms/token")[2].partition("report:")[0].splitlines()
    assert [row for row in rows if row.split()[:1] == ["teacher"]], printed
    return rows


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path: Path, ray_session: None) -> None:
    options = small(
        "training.num_steps=300", "training.validate_every_steps=150",
        "training.checkpoint_every_steps=1000000",
    )  # fmt: skip
    process = Started("pretrain", *options, "--workspace", str(tmp_path))
    _wait_for(lambda: any(_journal_steps(tmp_path)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left behind: {alive}"
    saved = sorted(path.name for path in tmp_path.glob("runs/*/step_*"))
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert 0 < step < 300
    before = _journal_steps(tmp_path)
    assert "checkpoint:" in answer("pretrain", *options, workspace=tmp_path)
    after = _journal_steps(tmp_path)[len(before) :]
    assert min(after) > step, "it went on, not over"
    assert max(after) == 300


def _journal_steps(workspace: Path) -> list[int]:
    journals = [path.read_text() for path in workspace.glob("runs/*/journal.jsonl")]
    lines = [line for journal in journals for line in journal.splitlines()]
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [r["step"] for r in records if r["kind"] == "metrics"]


def _wait_for(condition: object, process: Started, seconds: float = 150.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, "it did not come that far in time"
        time.sleep(0.1)


def test_sweep_iterations_compares_methods_at_their_best_rates(
    tmp_path: Path, ray_session: None
) -> None:
    options = small(
        "sweep.methods=[vanilla, pcformer, iiet]", "sweep.iterations=[0, 1]",
        "sweep.learning_rates={vanilla: [1.0e-2, 1.0e-5]}", "sweep.trials_at_once=1",
    )  # fmt: skip
    plan = answer("sweep-iterations", "--asha", "--dry-run", *options, workspace=tmp_path)
    assert "one of 2 learning rates of a model continues at 0.25, 0.5 of the steps (ASHA)" in plan
    printed = answer("sweep-iterations", "--asha", *options, workspace=tmp_path)
    for label in ("vanilla, rate 0.01", "pcformer", "r = 0", "r = 1"):
        assert label in printed
    assert "trial vanilla, rate 1e-05 stopped early at step 6 of 12" in printed
    assert "5 trials, 1 stopped early" in printed


SWEEP_TO_END = small(
    "sweep.methods=[vanilla, iiet]", "sweep.iterations=[1]", "sweep.trials_at_once=1",
    "training.num_steps=500", "training.checkpoint_every_steps=20",
)  # fmt: skip


def _sweep_in_its_second_trial(workspace: Path) -> Started:
    """Start a sweep and return when one trial is finished and another one has a checkpoint."""
    process = Started("sweep-iterations", *SWEEP_TO_END, "--workspace", str(workspace))

    def one_is_finished_and_one_is_running() -> bool:
        finished = {path.parent for path in workspace.glob("runs/*/done.json")}
        saved = {path for path in workspace.glob("runs/*") if find_checkpoints(path)}
        running = saved - finished
        return bool(finished and running)

    _wait_for(one_is_finished_and_one_is_running, process)
    return process


def _ends_from_where_it_was(workspace: Path) -> None:
    """Run the sweep again and check that it trained nothing twice."""
    finished = {path.parent for path in workspace.glob("runs/*/done.json")}
    newest = {p: find_checkpoints(p)[-1] for p in workspace.glob("runs/*") if find_checkpoints(p)}
    assert len(finished) < len(newest) == 2
    printed = run("sweep-iterations", *SWEEP_TO_END, workspace=workspace)
    assert "of them found finished" in printed
    assert len(list(workspace.glob("runs/*/done.json"))) == 2
    for folder, checkpoint in newest.items():
        records = read_journal(folder)[0]
        resumed = [r["path"] for r in records if r.get("name") == "resumed"]
        place = str(checkpoint.relative_to(workspace))
        assert resumed == ([] if folder in finished else [place])


@pytest.mark.long
def test_a_sweep_resumes_after_its_driver_is_killed(tmp_path: Path) -> None:
    process = _sweep_in_its_second_trial(tmp_path)
    trainers = [p for p in psutil.Process(process.pid).children(recursive=True) if _trains(p)]
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(trainers, timeout=30)
    assert trainers
    assert not alive, "who trains ends with the driver"
    _ends_from_where_it_was(tmp_path)


@pytest.mark.long
def test_ctrl_c_of_a_sweep_saves_its_running_trial_and_the_same_command_resumes(
    tmp_path: Path,
) -> None:
    process = _sweep_in_its_second_trial(tmp_path)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left behind: {alive}"
    (stopped,) = [
        (folder, record["step"])
        for folder in tmp_path.glob("runs/*")
        for record in read_journal(folder)[0]
        if record.get("name") == "stopped"
    ]
    folder, step = stopped
    assert 20 <= step < 500
    assert find_checkpoints(folder)[-1].name == f"step_{step:08}", "all of its steps are saved"
    assert re.search(rf"iiet-orch: interrupted; .* of 2 trials .*: saved at step {step};", printed)
    _ends_from_where_it_was(tmp_path)


def _trains(process: psutil.Process) -> bool:
    return "ImplicitFunc.train" in " ".join(process.cmdline())  # Tune's, around a trial
