"""A driver under Ray that is interrupted or killed leaves a run that resumes, and no process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from commands import Started
from same_run import curve, events, in_folder, state_of, steps_of

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints

DRIVER = """
import json, pathlib, sys
from orchestrator.cluster.train import run_train_jobs
from orchestrator.settings import ClusterSettings
from orchestrator.records.training import TrainingJob
from orchestrator.workspace.errors import Interrupted
job = TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
try:
    run_train_jobs([job], ClusterSettings(num_workers=int(sys.argv[2])))
except (Interrupted, KeyboardInterrupt):
    sys.exit(130)
"""


@pytest.fixture
def job(tiny_job: Callable[..., TrainingJob]) -> TrainingJob:
    return tiny_job(num_steps=400, validate_every_steps=400, checkpoint_every_steps=20)


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """The driver's processes; those that a killed driver leaves behind are ended after the test."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "num_workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 1)]
)
def test_an_interrupted_driver_leaves_a_run_that_resumes(
    job: TrainingJob, family: list[psutil.Process], number: int, num_workers: int
) -> None:
    path = job.folder.with_suffix(".json")
    path.write_text(json.dumps(job.model_dump(mode="json")))
    driver = Started(str(path), str(num_workers), code=DRIVER, own_session=True)
    while not find_checkpoints(job.folder):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    family += psutil.Process(driver.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # To the whole group, as a terminal does.
    else:
        driver.send_signal(number)
    errors, _ = driver.communicate(timeout=120)

    if number != signal.SIGKILL:
        assert driver.returncode == 130, errors
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        [stopped] = events(job, "stopped")
        assert stopped == read_journal(job.folder)[0][-1]
        assert steps_of(job)[-1] == stopped["step"]
    assert not (job.folder / DONE_NAME).exists()

    whole = in_folder(job, "whole")
    outcomes = [run_here(each, as_in=job) for each in (whole, job)]  # One worker, and no Ray.
    if num_workers == 1:
        assert curve(job) == curve(whole)
        assert state_of(outcomes[0]) == state_of(outcomes[1])
    else:
        # Two workers add in another order, and 400 steps carry the rounding on: by up to 1e-4 of
        # the loss. Another batch in one step would change losses by more than a hundredth.
        assert curve(job) == pytest.approx(curve(whole), rel=1e-3)


def run_here(job: TrainingJob, *, as_in: TrainingJob) -> TrainingOutcome:
    """Run a job in this process, with as many threads as another's worker had."""
    before = torch.get_num_threads()
    torch.set_num_threads(events(as_in, "started")[0]["num_threads"])
    try:
        return run_job(job)
    finally:
        torch.set_num_threads(before)
