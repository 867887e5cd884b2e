"""A function runs on a node with a GPU; progress, log lines, result and errors come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretended_cluster import pretended_cluster

from orchestrator.cluster.launch import trial_device
from orchestrator.settings import resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.devices import on_cpu

DRIVER = """
import json, logging, os, signal, sys, time
from functools import partial
from pathlib import Path
from orchestrator.cluster.gpu_task import WAITING
from orchestrator.cluster.launch import command_device, trial_device
from orchestrator.cluster.placement import Placement
from orchestrator.cluster.tune import TrialPlace
from orchestrator.cluster.start import ray_cluster
from orchestrator.settings import ClusterSettings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import Interrupted, UserError
import ray
from ray.util.placement_group import placement_group, remove_placement_group

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

found = {}
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(f"{record.name} {record.levelname} {self.format(record)}")
logging.getLogger().addHandler(Lines())

on_gpu = trial_device(resolve_settings({}, ["cluster.num_gpus=2"]), Path())
with ray_cluster():
    progress = Recorded()
    device, num_gpus, where, number = on_gpu(partial(measure, 7), progress)
    found["result"] = [device, num_gpus, number]
    found["is elsewhere"] = where != node()
    found["calls"] = progress.calls
    found["lines"] = lines
    try:
        command_device(ClusterSettings(), Path())(mistake, Progress())
    except UserError as error:
        found["error"] = [str(error), "in mistake" in str(error.__cause__)]
    workers = Placement(jobs_at_once=1, workers=2, cpus=1, gpus=1)
    try:
        TrialPlace(workers, ClusterSettings()).on_device(lambda device: mistake(device, None))
    except UserError as error:
        found["error of a trial"] = str(error)
    found["after a death"] = on_gpu(partial(die_once, Path(sys.argv[1])), Progress())

    others = placement_group([{"GPU": 1}] * 2)
    others.wait(60)

    class Pressing(Recorded):
        def advance(self, done, text="", *, seconds_left=None):
            super().advance(done, text)
            if text == WAITING:
                remove_placement_group(others)
            if text == "runs":
                os.kill(os.getpid(), signal.SIGINT)

    progress = Pressing()
    try:
        on_gpu(never_end, progress)
    except Interrupted as error:
        found["interrupted"] = str(error)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    found["free GPUs"] = ray.available_resources().get("GPU")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    marker = tmp_path_factory.mktemp("task") / "died"
    with pretended_cluster() as environment:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(marker)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.slow
def test_it_runs_on_a_node_with_gpus_and_reserves_one(found: dict[str, Any]) -> None:
    assert found["result"] == ["cpu", 1, 7], "a pretended GPU computes on the CPU"
    assert found["is elsewhere"]


@pytest.mark.slow
def test_progress_and_log_lines_come_back(found: dict[str, Any]) -> None:
    assert found["calls"] == [[0, "waiting for a free GPU"], [0, ""], [1, "half"], "a note"]
    assert "a.library WARNING careful with 7" in found["lines"]


@pytest.mark.slow
def test_a_mistake_keeps_its_type_and_its_traceback(found: dict[str, Any]) -> None:
    assert found["error"] == ["type something else", True]
    assert found["error of a trial"] == "type something else", "whose workers had the GPUs"


@pytest.mark.slow
def test_a_process_that_died_is_started_again(found: dict[str, Any]) -> None:
    assert found["after a death"] == "alive"


@pytest.mark.slow
def test_an_interruption_ends_the_task_and_frees_its_gpu(found: dict[str, Any]) -> None:
    assert "run the same command again to resume" in found["interrupted"]
    assert found["free GPUs"] == 2


def test_a_sweep_on_cpus_measures_in_this_process() -> None:
    def device(name: str, _: Progress) -> str:
        return name

    assert on_cpu(device, Progress()) == "cpu"
    assert trial_device(resolve_settings({}, []), Path())(device, Progress()) == "cpu"
