"""A job or trial whose Ray node is lost waits for a slot, and resumes on another node that joins
later; a job with `cluster.min_gpus` goes on with fewer workers, and grows back, but
does not wait for ever.

The nodes are several in one machine, in a process of its own; one of them is removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_cluster import run_driver
from same_run import curve, stop_at

from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal

pytestmark = pytest.mark.long

NODES = """
import contextlib, json, os, pathlib, signal, sys, time
import orchestrator.cluster  # sets what Ray reads when it is imported
from ray.cluster_utils import Cluster

kind = sys.argv[2]
small = {"object_store_memory": 80 * 2**20, "num_cpus": 1, "num_gpus": int(kind == "fewer")}
# A node is given up after about two seconds instead of half a minute.
patience = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
head = {**small, "num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args={**head, "_system_config": patience})
if kind == "fewer":
    nodes.add_node(**small)
doomed = nodes.add_node(**small)
os.environ["RAY_ADDRESS"] = nodes.address

from orchestrator.cluster import train
from orchestrator.cluster.ray import ray_cluster
from orchestrator.cluster.tune import run_queue
from orchestrator.records.training import TrainingJob
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints

job = TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
events = []

def once(event):
    if event not in events:
        events.append(event)
        return True

def records():
    return read_journal(job.folder)[0] if job.folder.exists() else []
"""

LOST = """
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

notes = []
deadline = time.time()

def watch(_=None):
    global deadline
    if kind == "notice" and any(r["kind"] == "metrics" for r in records()) and once("notice"):
        deadline = time.time() + 10
        client = GcsClient(address=nodes.address)
        deadline_ms = int(1000 * deadline)
        client.drain_node(doomed.node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)
    if find_checkpoints(job.folder) and time.time() > deadline and once("node is lost"):
        nodes.remove_node(doomed, allow_graceful=False)
    # The driver says that it waits before a new node joins.
    if "node is lost" in events and (notes or kind == "trial") and once("node joins"):
        nodes.add_node(**small)

def train_trial(trial, place):
    from orchestrator.training.trainer import run_job
    return trial if run_job(trial.job).finished else None

try:
    with ray_cluster():
        if kind == "trial":
            suite = Suite(tokens_folder=job.tokens_folder)
            trial = Trial(
                key="x", role="trial", model=job.model, folder=job.run_folder, job=job, suite=suite
            )
            plan = SweepTrials(
                key="x", name="x", kind="threshold", tokens_folder=job.tokens_folder, teacher=None,
                num_requested=1, trials=(trial,),
            )
            queue = RunningSweep(plan, trial_states(plan, SweepSettings()))
            folder = job.folder.with_name("sweep")
            settings = SweepSettings(), ClusterSettings()
            run_queue(train_trial, queue, folder, *settings, num_trials=1, watch=watch)
            assert queue.num_of("finished") == 1, queue.failures
        else:
            # A loss that was announced is no failure.
            settings = ClusterSettings(max_failures=0)
            train.run_train_jobs([job], settings, watch=watch, note=notes.append)
            assert notes == ["disturbed waits for a slot: 0 of 1 CPUs are free"], notes
finally:
    nodes.shutdown()
assert "node joins" in events
"""

FEWER = """
train.GROW_SECONDS = 5.0  # instead of minutes

def watch():
    resumed = [r["num_workers"] for r in records() if r.get("name") == "resumed"]
    if find_checkpoints(job.folder) and once("node is lost"):
        nodes.remove_node(doomed, allow_graceful=False)
    if resumed == [1] and once("node joins"):
        nodes.add_node(**small)
    if resumed == [1, 2] and records()[-1].get("name") == "checkpoint" and once("stop"):
        os.kill(os.getpid(), signal.SIGINT)

try:
    with contextlib.suppress(Interrupted):
        train.run_train_jobs([job], ClusterSettings(num_gpus=2, min_gpus=1), watch=watch)
finally:
    nodes.shutdown()
"""


def disturbed(
    code: str,
    kind: str,
    tiny_job: Callable[..., TrainingJob],
    num_steps: int,
    every: int,
    **more: Any,
) -> tuple[TrainingJob, TrainingJob, list[dict[str, Any]]]:
    """Run a job on the nodes; return it, its twin that has not run, and its starts."""
    steps = {"num_steps": num_steps, "validate_every_steps": num_steps}
    job, undisturbed = (
        tiny_job(name, **steps, checkpoint_every_steps=every, **more)
        for name in ("disturbed", "whole")
    )
    path = job.folder.with_suffix(".json")
    path.write_text(json.dumps(job.model_dump(mode="json")))
    soon = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}  # A notice is heard sooner.
    variables = {**soon, "IIET_PRETENDED_GPUS": "1"} if kind == "fewer" else soon
    run_driver(NODES + code, str(path), kind, timeout=500, variables=variables)
    records = read_journal(job.folder)[0]
    return job, undisturbed, [r for r in records if r.get("name") in ("started", "resumed")]


@pytest.mark.parametrize("kind", ["trial", "notice"])
def test_a_lost_node_changes_no_loss(kind, tiny_job):
    # After a notice, a checkpoint is written although none is due.
    steps, every = (5000, 5000) if kind == "notice" else (400, 20)
    job, undisturbed, (started, resumed) = disturbed(LOST, kind, tiny_job, steps, every)
    assert (started["name"], resumed["name"]) == ("started", "resumed")
    assert started["pid"] != resumed["pid"]
    assert resumed["step"] >= (1 if kind == "notice" else 20)
    torch.set_num_threads(started["num_threads"])
    run_job(undisturbed)
    assert curve(job) == curve(undisturbed)


def test_a_job_goes_on_with_fewer_workers_and_grows_back(tiny_job):
    # A low rate: rounding does not grow over thousands of steps.
    job, undisturbed, starts = disturbed(FEWER, "fewer", tiny_job, 25_000, 1000, learning_rate=1e-5)
    assert [start["num_workers"] for start in starts] == [2, 1, 2]
    assert [start["step"] % 1000 for start in starts[1:]] == [0, 0], "from the newest checkpoint"
    varied = curve(job)
    assert max(varied) > starts[2]["step"]
    run_job(undisturbed, should_stop=stop_at(max(varied)))
    assert varied == pytest.approx(curve(undisturbed), abs=1e-4)
