"""Work runs where the settings say: on a node with a GPU, in this process, or under Ray Train."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pretended_cluster import pretended_cluster

from orchestrator.cluster import task
from orchestrator.cluster.task import command_device, run_local_jobs, trial_device
from orchestrator.cluster.train import run_train_jobs
from orchestrator.models.folder import weights_key
from orchestrator.planning.machine import Node, Resources
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints, step_of

DRIVER = """
import json, logging, os, signal, sys, time
from functools import partial
from pathlib import Path
from orchestrator.cluster.ray import ray_cluster
from orchestrator.cluster.task import WAITING, command_device, trial_device
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
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["result"] == ["cpu", 1, 7], "a pretended GPU computes on the CPU"
    assert found["is elsewhere"]
    assert found["calls"] == [[0, "waiting for a free GPU"], [0, ""], [1, "half"], "a note"]
    assert "a.library WARNING careful with 7" in found["lines"]
    assert found["error"] == ["type something else", True], "its type and its traceback"
    assert found["after a death"] == "alive"
    assert "run the same command again to resume" in found["interrupted"]
    assert found["free GPUs"] == 2


def test_a_sweep_on_cpus_measures_in_this_process():
    on_device = trial_device(resolve_settings({}, []), Path())
    assert on_device(lambda device, _: device, Progress()) == "cpu"


@pytest.fixture
def two_gpus(monkeypatch) -> list[str]:
    """A machine with two GPUs; returns those that were made the current one."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def _device_of(folder: Path, **cluster: object) -> str:
    found = command_device(ClusterSettings(**cluster), folder)  # type: ignore[arg-type]
    return found(lambda device, _: device, Progress())


def test_work_runs_on_the_device_that_the_settings_name(two_gpus, tmp_path, monkeypatch):
    assert _device_of(tmp_path) == "cuda"
    assert _device_of(tmp_path, device="cuda:1") == "cuda:1"
    assert _device_of(tmp_path, device="cuda:1", num_gpus=2) == "cuda:1"
    assert two_gpus == ["cuda:1", "cuda:1"], "what allocates without a device uses it, too"
    assert _device_of(tmp_path, device="cpu", num_gpus=2) == "cpu"
    assert _device_of(tmp_path, device="cpu", address="10.0.0.1:6379") == "cpu"

    one_gpu = Resources((Node(1, 1),))
    monkeypatch.setattr(task, "ray_cluster", lambda *_, **__: nullcontext(one_gpu))
    monkeypatch.setattr(task, "run_gpu_task", lambda *_: "a task")
    assert _device_of(tmp_path, device="cuda", num_gpus=1) == "a task"
    assert _device_of(tmp_path, device="cuda", address="10.0.0.1:6379") == "a task"

    for gpus, device, words in (
        (0, "cuda", "no GPU that PyTorch"),
        (4, "cuda:4", "--device cuda:4: this machine has cuda:0, cuda:1, cuda:2, cuda:3"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=words):
            _device_of(tmp_path, device=device)


@pytest.fixture
def job(tiny_job) -> TrainingJob:
    return tiny_job(
        num_steps=30, validate_every_steps=15, checkpoint_every_steps=10, iterate_from_fraction=0.5
    )


def said(job: TrainingJob) -> list[tuple[int, str, float]]:
    """Return all that a journal says about losses, gradients and FLOPs."""
    return [
        (record["step"], name, value)
        for record in read_journal(job.folder)[0]
        for name, value in record.get("values", {}).items()
        if name in ("train/loss", "train/gradient_norm", "train/flops", "validation/loss")
    ]


def weights(job: TrainingJob) -> str:
    return weights_key(find_checkpoints(job.folder)[-1])


def at_step(job: TrainingJob, step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return a watch that acts once, when the journal has come to a step."""
    done: list[bool] = []

    def watch() -> None:
        steps = [r["step"] for r in read_journal(job.folder)[0] if r["kind"] == "metrics"]
        if steps and steps[-1] >= step and not done:
            done.append(True)
            act()

    return watch


@pytest.mark.long
def test_losses_and_weights_are_those_of_ray_to_the_last_bit(ray_session, job, monkeypatch):
    # As many threads as the one worker of the session's Ray.
    monkeypatch.setattr(task, "local_resources", lambda **_: Resources((Node(2),)))
    under_ray = job.model_copy(update={"run_folder": f"{job.run_folder}-ray"})
    (expected,) = run_train_jobs([under_ray])
    (outcome,) = run_local_jobs([job])
    assert said(job) == said(under_ray)
    assert weights(job) == weights(under_ray)
    assert outcome.validation_loss == expected.validation_loss


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_call_goes_on(job, monkeypatch):
    monkeypatch.setattr(task, "POLL_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    interrupt = at_step(job, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as caught:
        run_local_jobs([job], watch=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    stopped = find_checkpoints(job.folder)[-1]
    assert f"interrupted; saved at step {step_of(stopped)}; " in str(caught.value)
    assert "00000007" <= stopped.name.removeprefix("step_") < "00000010"
    looks: list[int] = []
    (outcome,) = run_local_jobs([job], watch=lambda: looks.append(1))
    assert outcome.finished
    assert len(looks) > 10, "progress is shown between steps"

    whole = job.model_copy(update={"run_folder": f"{job.run_folder}-whole"})

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="not saved in time; nothing was saved"):
        run_local_jobs([whole], watch=at_step(whole, 3, twice))
    shutil.rmtree(whole.folder)
    run_local_jobs([whole])
    assert said(job) == said(whole)
    assert weights(job) == weights(whole)


@pytest.mark.parametrize(
    ("num_saved", "saved"), [(0, "nothing was saved"), (1, "saved at step [36]0")]
)
def test_after_ctrl_c_an_error_is_reported_with_what_was_saved_before_it(
    num_saved, saved, tiny_job, monkeypatch
):
    # The second checkpoint is so late that the first is seen before it, also on a busy machine.
    job = tiny_job(num_steps=90, validate_every_steps=90, checkpoint_every_steps=30)
    monkeypatch.setattr(task, "POLL_SECONDS", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def interrupt_and_refuse_to_save() -> None:
        if len(find_checkpoints(job.folder)) >= num_saved:
            # The system refuses to write more into one file, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
            os.kill(os.getpid(), signal.SIGINT)

    # The first checkpoint is written beside the steps after it.
    at_once = interrupt_and_refuse_to_save
    watch = at_once if num_saved else at_step(job, 3, at_once)
    try:
        with pytest.raises(CheckpointWriteFailed, match=f"while the run was stopping; {saved}$"):
            run_local_jobs([job], watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
