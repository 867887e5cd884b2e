"""Jobs are placed on the cluster that docs/scaling.md describes, and on nodes of unequal size.

Its GPUs are pretended, and the cluster has a process of its own. Nothing is trained: the placement
group of each job that runs at the same time becomes ready, as Ray Train and Ray Tune ask for it.
"""

import json
import re
from pathlib import Path

import pytest
from pretended_cluster import run_driver

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
PLACE = """
import json, os, sys
import orchestrator.cluster  # sets what Ray reads when it is imported
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

def add(cpus, gpus):
    return cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=80 * 2**20)

cluster = Cluster()
cluster.add_node(
    num_cpus=8, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False
)
os.environ["RAY_ADDRESS"] = cluster.address

from orchestrator.cluster.placement import alive_nodes, job_placement
from orchestrator.cluster.ray import ray_cluster
from orchestrator.planning.machine import Resources

def place(num_gpus, num_jobs):
    job = job_placement(num_jobs, 1, num_gpus, Resources(alive_nodes()))
    number = range(job.jobs_at_once)
    trials = [placement_group([job.trial_resources]) for _ in number if job.workers > 1]
    workers = [placement_group([job.worker_resources] * job.workers, job.strategy) for _ in number]
    ready = [group.wait(30) for group in trials + workers]
    nodes_of_trials, nodes = (
        [set(placement_group_table(g)["bundles_to_node_id"].values()) for g in groups]
        for groups in (trials, workers)
    )
    for group in trials + workers:
        remove_placement_group(group)
    return {
        "ready": all(ready),
        "nodes": [len(of_job) for of_job in nodes],
        "nodes_of_trials": len(set().union(*nodes_of_trials)),
        "cpus": job.cpus,
    }

cases = json.loads(sys.argv[1])
placements = {}
with ray_cluster():
    nodes = [add(64, 8) for _ in range(4)]
    placements["documented"] = [place(*case) for case in cases["documented"]]
    for node in nodes[1:]:
        cluster.remove_node(node)
    add(16, 4)
    placements["unequal"] = [place(*case) for case in cases["unequal"]]
cluster.shutdown()
print(json.dumps(placements))
"""
NUM_GPUS = 32
"""Those of the pretended cluster; a page may speak of more."""
DOCUMENTED = {
    int(number) for number in re.findall(r"--gpus (\d+)", TEXT) if int(number) <= NUM_GPUS
}
TABLE = {
    float(gpus): (int(num_nodes), int(at_once))
    for gpus, num_nodes, at_once in re.findall(
        r"^\| `--gpus(?:-per-trial)? ([\d.]+)` \| (\d+) \| (\d+) \|$", TEXT, flags=re.MULTILINE
    )
}
CASES = {
    "documented": [*[[gpus, 200] for gpus in TABLE], [3, 200]],
    "unequal": [[8, 100], [12, 100], [4, 100], [0.5, 100]],
}


@pytest.mark.long
def test_jobs_are_placed_as_the_table_says_and_on_nodes_of_unequal_size():
    variables = {"IIET_PRETENDED_GPUS": "1"}
    printed = run_driver(PLACE, json.dumps(CASES), timeout=300, variables=variables)
    placements = json.loads(printed.splitlines()[-1])
    assert set(TABLE) >= DOCUMENTED | {0.25, 16, 24}
    *documented, threes = placements["documented"]
    for (gpus, (num_nodes, at_once)), placed in zip(TABLE.items(), documented, strict=True):
        assert placed["ready"], gpus
        assert placed["nodes"] == [num_nodes] * at_once, gpus
        assert placed["cpus"] == (2 if gpus < 1 else 8)
    assert (threes["ready"], threes["nodes"]) == (True, [1] * 8)
    assert threes["nodes_of_trials"] > 1, "processes of trials are spread over the nodes"
    eight, twelve, four, halves = placements["unequal"]
    assert all(placed["ready"] for placed in placements["unequal"])
    assert (eight["nodes"], eight["cpus"]) == ([1], 4)
    assert (twelve["nodes"], four["nodes"], halves["nodes"]) == ([2], [1] * 3, [1] * 24)
