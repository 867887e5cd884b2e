"""A job with `cluster.min_gpus` loses a node, goes on with fewer workers, and grows back.

Two nodes in one machine, with one pretended GPU each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pretended_cluster import run_driver
from same_run import curve

from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal

pytestmark = pytest.mark.long

DRIVER = """
import contextlib, json, os, pathlib, signal, sys
import orchestrator.cluster  # sets what Ray reads when it is imported
from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 * 2**20, "num_cpus": 1, "num_gpus": 1}
# A node is given up after about two seconds instead of half a minute.
patience = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
head = {**small, "num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args={**head, "_system_config": patience})
nodes.add_node(**small)
doomed = nodes.add_node(**small)
os.environ["RAY_ADDRESS"] = nodes.address

from orchestrator.cluster import train
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings
from orchestrator.models.folder import (find_checkpoints)
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import read_journal

train.GROW_SECONDS = 5.0  # instead of minutes
job = TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
todo = ["lose a node", "add a node", "stop"]

def watch():
    records = read_journal(job.folder)[0] if job.folder.exists() else []
    resumed = [r["num_workers"] for r in records if r.get("name") == "resumed"]
    if len(todo) == 3 and find_checkpoints(job.folder):
        todo.pop(0)
        nodes.remove_node(doomed, allow_graceful=False)
    elif len(todo) == 2 and resumed == [1]:
        todo.pop(0)
        nodes.add_node(**small)
    elif len(todo) == 1 and resumed == [1, 2] and records[-1].get("name") == "checkpoint":
        todo.pop(0)
        os.kill(os.getpid(), signal.SIGINT)

try:
    with contextlib.suppress(Interrupted):
        train.run_train_jobs([job], ClusterSettings(num_gpus=2, min_gpus=1), watch=watch)
finally:
    nodes.shutdown()
"""


def test_a_job_goes_on_with_fewer_workers_and_grows_back(
    tmp_path: Path, tiny_job: Callable[..., TrainingJob]
) -> None:
    def job(name: str) -> TrainingJob:
        # A low rate: rounding does not grow over thousands of steps.
        recipe = {"num_steps": 25_000, "validate_every_steps": 25_000, "learning_rate": 1e-5}
        return tiny_job(name, **recipe, checkpoint_every_steps=1000)

    path = tmp_path / "job.json"
    path.write_text(json.dumps(job("varied").model_dump(mode="json")))
    run_driver(DRIVER, str(path), timeout=500, variables={"IIET_PRETENDED_GPUS": "1"})
    records = read_journal(tmp_path / "varied")[0]
    starts = [r for r in records if r.get("name") in ("started", "resumed")]
    assert [start["num_workers"] for start in starts] == [2, 1, 2]
    assert [start["step"] % 1000 for start in starts[1:]] == [0, 0], "from the newest checkpoint"

    varied = curve(job("varied"))
    assert max(varied) > starts[2]["step"]
    steps = iter(range(10**6))
    run_job(job("whole"), should_stop=lambda: next(steps) == max(varied))
    assert varied == pytest.approx(curve(job("whole")), abs=1e-4)
