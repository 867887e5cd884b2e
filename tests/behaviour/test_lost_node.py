"""A job or trial whose Ray node is lost resumes on another node: two nodes in one machine, one
of them removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.records.training import TrainingJob
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import read_journal

DRIVER = """
import json, os, pathlib, sys
import orchestrator.cluster  # sets what Ray reads when it is imported
from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 * 2**20, "num_gpus": 0}
# A node is given up after about two seconds instead of half a minute.
patience = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
head = {**small, "num_cpus": 0, "include_dashboard": False, "_system_config": patience}
nodes = Cluster(initialize_head=True, head_node_args=head)
doomed = nodes.add_node(num_cpus=1, **small)
os.environ["RAY_ADDRESS"] = nodes.address

from orchestrator.cluster.ray_train import run_train_jobs
from orchestrator.cluster.ray_tune import TrialHooks, run_trials
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.records.training import TrainingJob

job = TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
lost = []

def watch():
    if not lost and find_checkpoints(job.folder):
        lost.append(True)
        nodes.remove_node(doomed, allow_graceful=False)
        nodes.add_node(num_cpus=1, **small)

def train(parameters, context):
    job = TrainingJob.model_validate(parameters)
    return {"finished": context.train(job, lambda: False).finished}

try:
    if sys.argv[2] == "job":
        run_train_jobs([job], watch=watch)
    else:
        folder = job.folder.with_name("sweep")
        trials = {"a trial": job.model_dump(mode="json")}
        report = run_trials(train, trials, folder, hooks=TrialHooks(watch=watch))["a trial"]
        assert report.result == {"finished": True}, report
finally:
    nodes.shutdown()
assert lost
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["job", pytest.param("trial", marks=pytest.mark.long)])
def test_a_lost_node_changes_no_loss(
    kind: str, tmp_path: Path, tiny_job: Callable[..., TrainingJob]
) -> None:
    def job(name: str) -> TrainingJob:
        return tiny_job(name, num_steps=300, validate_every_steps=300, checkpoint_every_steps=20)

    path = tmp_path / "job.json"
    path.write_text(json.dumps(job("lost").model_dump(mode="json")))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # Short: a socket's path has little room.
    with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(path), kind],
            env={**environment, "RAY_TMPDIR": scratch},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    records = read_journal(tmp_path / "lost")[0]
    started, resumed = (r for r in records if r.get("name") in ("started", "resumed"))
    assert (started["name"], resumed["name"]) == ("started", "resumed")
    assert started["pid"] != resumed["pid"]
    assert resumed["step"] >= 20

    before = torch.get_num_threads()
    torch.set_num_threads(started["num_threads"])
    try:
        run_job(job("whole"))
    finally:
        torch.set_num_threads(before)
    assert losses(tmp_path / "lost") == losses(tmp_path / "whole")


def losses(folder: Path) -> dict[int, float]:
    return {
        record["step"]: record["values"]["train/loss"]
        for record in read_journal(folder)[0]
        if "train/loss" in record.get("values", {})
    }
