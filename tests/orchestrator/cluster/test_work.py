"""Work is done where the settings say: by a task on a node with a GPU, or in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from pretended_cluster import pretended_cluster
from pretended_ray import idle_ray, run_tasks_here
from refusals import refused

from orchestrator.cluster.work import Executor, command_executor, sweep_executor
from orchestrator.planning.machine import Node
from orchestrator.settings import ClusterSettings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError

DRIVER = """
import json, logging, os, signal, sys, time
from functools import partial
from pathlib import Path
from orchestrator.cluster.ray import ray_cluster
from orchestrator.cluster.work import WAITING, Executor, command_executor, sweep_executor
from orchestrator.settings import ClusterSettings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import Interrupted, UserError
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

class Recorded(Progress):
    def __init__(self):
        self.calls = []
    def advance(self, done, text="", *, seconds_left=None):
        self.calls.append([done, text])
    def note(self, text):
        self.calls.append(text)

def node():
    return ray.get_runtime_context().get_node_id()

def measure(number, device, progress):
    progress.advance(1, "half")
    progress.note("a note")
    logging.getLogger("a.library").warning("careful with %s", number)
    return [device, len(ray.get_gpu_ids()), node(), number]

def mistake(device, progress):
    raise UserError("type something else")

def die_once(marker, device, progress):
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "alive"

def never_end(device, progress):
    while True:
        progress.advance(1, "runs")
        time.sleep(0.05)

report = {}
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(f"{record.name} {record.levelname} {self.format(record)}")
logging.getLogger().addHandler(Lines())

on_gpu = sweep_executor(resolve_settings({}, ["cluster.num_gpus=2"]), Path()).run
with ray_cluster():
    progress = Recorded()
    device, num_gpus, node_id, number = on_gpu(partial(measure, 7), progress)
    report["result"] = [device, num_gpus, number]
    report["is elsewhere"] = node_id != node()
    report["calls"] = progress.calls
    report["lines"] = lines
    try:
        command_executor(ClusterSettings(), Path()).run(mistake, Progress())
    except UserError as error:
        report["error"] = [str(error), "in mistake" in str(error.__cause__)]
    report["after a death"] = on_gpu(partial(die_once, Path(sys.argv[1])), Progress())

    # A trial whose workers had GPUs: its process is in a group without any, which tasks inherit.
    trial_group = placement_group([{"CPU": 1}])
    in_group = PlacementGroupSchedulingStrategy(
        trial_group, placement_group_capture_child_tasks=True
    )

    @ray.remote(num_cpus=1, scheduling_strategy=in_group)
    def trial():
        return Executor(needs_gpu=True, num_cpus=1).run(partial(measure, 8), Progress())

    report["of a trial"] = ray.get(trial.remote(), timeout=120)
    remove_placement_group(trial_group)

    all_gpus = placement_group([{"GPU": 1}] * 2)
    all_gpus.wait(60)

    class Pressing(Recorded):
        def advance(self, done, text="", *, seconds_left=None):
            super().advance(done, text)
            if text == WAITING:
                remove_placement_group(all_gpus)
            if text == "runs":
                os.kill(os.getpid(), signal.SIGINT)

    progress = Pressing()
    try:
        on_gpu(never_end, progress)
    except Interrupted as error:
        report["interrupted"] = str(error)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    report["free GPUs"] = ray.available_resources().get("GPU")
print(json.dumps(report))
"""


@pytest.mark.long
def test_a_task_runs_on_a_node_with_a_gpu_and_all_that_it_says_comes_back(tmp_path):
    with pretended_cluster() as environment:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path / "died")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["result"] == ["cpu", 1, 7], "a pretended GPU computes on the CPU"
    assert report["is elsewhere"]
    assert report["calls"] == [[0, "waiting for a free GPU"], [0, ""], [1, "half"], "a note"]
    assert "a.library WARNING careful with 7" in report["lines"]
    assert report["error"] == ["type something else", True], "its type and its traceback"
    assert report["after a death"] == "alive"
    device, num_gpus, _, number = report["of a trial"]
    assert (device, num_gpus, number) == ("cpu", 1, 8)
    assert "the same command" in report["interrupted"]
    assert report["free GPUs"] == 2


def test_a_sweep_measures_on_a_gpu_if_its_trials_have_some_else_in_this_process():
    executor = sweep_executor(resolve_settings({}, []), Path())
    assert executor.run(lambda device, _: device, Progress()) == "cpu"
    assert sweep_executor(resolve_settings({}, ["cluster.num_gpus=2"]), Path()).needs_gpu


@pytest.fixture
def two_gpus(monkeypatch) -> list[str]:
    """A machine with two GPUs; returns those that were made the current one."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def _device_of(folder: Path, **cluster: object) -> str:
    executor = command_executor(ClusterSettings(**cluster), folder)  # type: ignore[arg-type]
    return executor.run(lambda device, _: device, Progress())


def test_work_runs_on_the_device_that_the_settings_name(two_gpus, tmp_path, monkeypatch):
    assert _device_of(tmp_path) == "cuda"
    assert _device_of(tmp_path, device="cuda:1") == "cuda:1"
    assert _device_of(tmp_path, device="cuda:1", num_gpus=2) == "cuda:1"
    assert two_gpus == ["cuda:1", "cuda:1"], "what allocates without a device uses it, too"
    assert _device_of(tmp_path, device="cuda") == "cuda"
    assert len(two_gpus) == 2, "PyTorch takes a GPU with its number alone"
    assert _device_of(tmp_path, device="cpu", num_gpus=2) == "cpu"
    assert _device_of(tmp_path, device="cpu", address="10.0.0.1:6379") == "cpu"

    for elsewhere in ({"num_gpus": 1}, {"address": "10.0.0.1:6379"}):
        cluster = ClusterSettings(device="cuda", **elsewhere)
        executor = Executor(needs_gpu=True, cluster=cluster, folder=tmp_path)
        assert command_executor(cluster, tmp_path) == executor

    for gpus, device, words in (
        (0, "cuda", "no GPU that PyTorch"),
        (4, "cuda:4", "--device cuda:4: this machine has cuda:0, cuda:1, cuda:2, cuda:3"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=words):
            _device_of(tmp_path, device=device)


def test_work_that_needs_a_gpu_of_ray_is_a_task_with_one(tmp_path, monkeypatch):
    idle_ray(monkeypatch, Node(1, gpus=1))
    attempts = run_tasks_here(monkeypatch)
    settings = resolve_settings({}, ["cluster.num_gpus=1"])
    for executor in (
        command_executor(ClusterSettings(device="cuda", num_gpus=1), tmp_path),
        sweep_executor(settings, tmp_path),
        Executor(needs_gpu=True),  # Within a trial, whose process is part of a Ray.
    ):
        attempts.clear()
        assert executor.run(lambda _, __: "done", Progress()) == "done"
        assert [options["num_gpus"] for options in attempts] == [1]


@pytest.mark.parametrize(("num_deaths", "is_done"), [(2, True), (3, False)])
def test_a_task_whose_process_dies_is_started_again_twice(num_deaths, is_done, monkeypatch):
    attempts = run_tasks_here(monkeypatch)

    def work(device: str, progress: Progress) -> str:
        if len(attempts) <= num_deaths:
            raise ray.exceptions.WorkerCrashedError
        return "done"

    if is_done:
        assert Executor(needs_gpu=True).run(work, Progress()) == "done"
    else:
        with refused(RunFailed, "3 times", "WorkerCrashedError"):
            Executor(needs_gpu=True).run(work, Progress())
    assert len(attempts) == 3
