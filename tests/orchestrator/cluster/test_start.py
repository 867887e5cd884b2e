"""Whatever ends a Ray job, it can go on, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import find_checkpoints, weights_key
from orchestrator.training.job import DONE_NAME, STOP_NAME, TrainingJob
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal

DRIVER = """
import json, pathlib, sys
from orchestrator.errors import Interrupted
from orchestrator.training.job import TrainingJob
from orchestrator.worker import run_train_job
job = TrainingJob.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
try:
    run_train_job(job, num_workers=int(sys.argv[2]))
except (Interrupted, KeyboardInterrupt):
    sys.exit(130)
"""


@pytest.fixture
def job(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> TrainingJob:
    return TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model=tiny_model,
        recipe=TrainingSettings(
            num_steps=400,
            num_tokens_per_step=64,
            validate_every_steps=400,
            num_validation_tokens=64,
            checkpoint_every_steps=20,
        ),
    )


def losses(job: TrainingJob) -> dict[int, float]:
    return {
        record["step"]: record["values"]["train/loss"]
        for record in read_journal(job.folder)[0]
        if "train/loss" in record.get("values", {})
    }


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """Processes that a test's driver started; what it leaves behind by design is ended here."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def start_driver(job: TrainingJob, num_workers: int = 1) -> subprocess.Popen[str]:
    path = job.folder.with_suffix(".json")
    path.write_text(json.dumps(job.to_dict()))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(path), str(num_workers)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
    while not condition():
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "num_workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 1)]
)
def test_an_interrupted_driver_leaves_a_run_that_goes_on(
    job: TrainingJob, family: list[psutil.Process], number: int, num_workers: int
) -> None:
    driver = start_driver(job, num_workers)
    wait_until(lambda: find_checkpoints(job.folder), driver)
    family += psutil.Process(driver.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # To everybody, as a terminal does.
    else:
        driver.send_signal(number)
    _, errors = driver.communicate(timeout=120)

    if number != signal.SIGKILL:
        assert driver.returncode == 130, errors
        assert not [process for process in family if is_alive(process)]
        last = read_journal(job.folder)[0][-1]
        assert last["name"] == "stopped"
        assert find_checkpoints(job.folder)[-1].name == f"step_{last['step']:08d}"
    assert not (job.folder / DONE_NAME).exists()

    whole = replace(job, run_folder=str(job.folder.parent / "whole"))
    run_here(whole, as_in=job)
    (job.folder / STOP_NAME).unlink(missing_ok=True)  # What the driver asked its workers for.
    run_here(job, as_in=job)  # One worker, and no Ray.
    if num_workers == 1:
        assert losses(job) == losses(whole)
        assert weights(job) == weights(whole)
    else:
        # Two workers add in another order, and 400 steps carry the rounding on: by up to 1e-4 of
        # the loss. Another batch in one step would change losses by more than a hundredth.
        assert losses(job) == pytest.approx(losses(whole), rel=1e-3)


def run_here(job: TrainingJob, *, as_in: TrainingJob) -> None:
    """Run a job in this process, with as many threads as another's worker had."""
    before = torch.get_num_threads()
    torch.set_num_threads(read_journal(as_in.folder)[0][0]["num_threads"])
    try:
        run_job(job)
    finally:
        torch.set_num_threads(before)


def weights(job: TrainingJob) -> str:
    return weights_key(find_checkpoints(job.folder)[-1])


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_ray_listens_on_loopback_only(ray_session: None) -> None:
    me = psutil.Process()
    addresses = set()
    for process in [me, *me.children(recursive=True)]:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_second_cluster_is_the_first(ray_session: None) -> None:
    from orchestrator.cluster.start import ray_cluster

    with ray_cluster() as outer, ray_cluster() as inner:
        assert inner is outer
    with ray_cluster() as still:
        assert still is outer


def test_an_address_where_nobody_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.cluster import start as cluster

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}"):
            cluster._check_reachable(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match="unset RAY_ADDRESS"):
            cluster._start(Path("unused"), None)


def test_a_token_is_asked_of_a_cluster_that_is_started_here_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.cluster import start as cluster

    here: dict[str, str] = {}
    elsewhere = {"RAY_ADDRESS": "ray.example:6379"}
    for environment in (here, elsewhere):
        monkeypatch.setattr(cluster.os, "environ", environment)
        cluster._prepare_environment()
    assert here["RAY_AUTH_MODE"] == "token"
    assert len(here["RAY_AUTH_TOKEN"]) == 64
    # `ray start` asks for none unless it was told to, and then says so itself.
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(elsewhere)
