"""A job that has no place waits for one, and a job or trial whose Ray node is lost resumes on
another node that joins later: two nodes in one machine, one of them removed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretended_cluster import run_driver
from same_run import curve

from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal

DRIVER = """
import json, os, pathlib, sys, time
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

from orchestrator.cluster.train import run_train_jobs
from orchestrator.cluster.tune import run_trials
from orchestrator.cluster.ray import ray_cluster
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.models.folder import (find_checkpoints)
from orchestrator.workspace.journal import read_journal

import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

job = TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
kind = sys.argv[2]
notes, events, deadline = [], [], time.time()

class Guest:
    def has_come(self):
        return True

def once(event):
    if event not in events:
        events.append(event)
        return True

def watch(_=None):
    global deadline
    # The driver says that it waits before the guest leaves, and again before a new node joins.
    if len(notes) == 1 and once("guest leaves"):
        ray.kill(guest)
    trains = any(r["kind"] == "metrics" for r in read_journal(job.folder)[0])
    if kind == "job after a notice" and trains and once("notice"):
        deadline = time.time() + 10
        client, milliseconds = GcsClient(address=nodes.address), int(1000 * deadline)
        client.drain_node(doomed.node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", milliseconds)
    if find_checkpoints(job.folder) and time.time() > deadline and once("node is lost"):
        nodes.remove_node(doomed, allow_graceful=False)
    if "node is lost" in events and (len(notes) == 2 or kind == "trial") and once("node joins"):
        nodes.add_node(num_cpus=1, **small)

def train(trial, place):
    return trial if place.train(trial.job).finished else None

class OneTrial:
    is_over, num_taken, ended = False, 0, None

    def take(self):
        if self.num_taken:
            return None
        self.num_taken = 1
        suite = TrialSuite(tokens_folder=job.tokens_folder)
        return Trial(
            key="x", role="trial", model=job.model, folder=job.run_folder, job=job, suite=suite
        )

    def on_start(self, key):
        pass

    def saved(self):
        return ""

    def seconds_to_save(self):
        return 60.0

    def on_end(self, key, result, error):
        self.is_over, self.ended = True, (result, error)

    watch = staticmethod(watch)

try:
    with ray_cluster():
        if kind == "trial":
            queue, folder = OneTrial(), job.folder.with_name("sweep")
            run_trials(train, queue, folder, SweepSettings(), ClusterSettings(), num_trials=1)
            assert queue.ended[0], queue.ended
        else:
            guest = ray.remote(num_cpus=1)(Guest).remote()
            ray.get(guest.has_come.remote())
            # A loss that was announced is no failure; another one is.
            settings = ClusterSettings(max_failures=int(kind == "job"))
            run_train_jobs([job], settings, watch=watch, note=notes.append)
            assert notes == ["lost waits for a place: 0 of 1 CPUs are free"] * 2, notes
            assert "guest leaves" in events
finally:
    nodes.shutdown()
assert "node joins" in events
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["job after a notice", "job", "trial"])
def test_a_lost_node_changes_no_loss(
    kind: str, tmp_path: Path, tiny_job: Callable[..., TrainingJob]
) -> None:
    def job(name: str) -> TrainingJob:
        # After a notice, a checkpoint is written although none is due.
        steps, every = (5000, 5000) if kind == "job after a notice" else (800, 20)
        recipe = {"num_steps": steps, "validate_every_steps": steps}
        return tiny_job(name, **recipe, checkpoint_every_steps=every)

    path = tmp_path / "job.json"
    path.write_text(json.dumps(job("lost").model_dump(mode="json")))
    soon = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}  # A notice is heard sooner.
    run_driver(DRIVER, str(path), kind, timeout=400, variables=soon)
    records = read_journal(tmp_path / "lost")[0]
    started, resumed = (r for r in records if r.get("name") in ("started", "resumed"))
    assert (started["name"], resumed["name"]) == ("started", "resumed")
    assert started["pid"] != resumed["pid"]
    assert resumed["step"] >= (1 if kind == "job after a notice" else 20)

    before = torch.get_num_threads()
    torch.set_num_threads(started["num_threads"])
    try:
        run_job(job("whole"))
    finally:
        torch.set_num_threads(before)
    assert curve(job("lost")) == curve(job("whole"))
