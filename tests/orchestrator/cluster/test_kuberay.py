"""A RayJob has the fields that KubeRay reads, and what a run of several nodes needs."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from orchestrator.cluster.deployment import Deployment
from orchestrator.cluster.kuberay import ray_job, to_yaml

WORDS = ("iiet-orch", "pretrain", "--gpus", "32", "--set", "data.files=[a b.txt, 'c: d']")


def make_job(**changes: Any) -> dict[str, Any]:
    """The job of 4 nodes with 8 GPUs, as Kubernetes reads it."""
    plan: dict[str, Any] = {
        "name": "iiet-pretrain",
        "words": WORDS,
        "workspace": "/shared/iiet",
        "num_nodes": 4,
        "gpus_per_node": 8,
        "cpus_per_node": 64,
        "memory_bytes": 100 * 2**30 - 5,
        "variables": ("HF_TOKEN",),
    }
    job = ray_job(Deployment(**plan | changes), image="image:1", claim="disk", secret="keys")
    read: dict[str, Any] = yaml.safe_load(to_yaml(job))
    return read


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_entrypoint_is_the_command() -> None:
    job = make_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert tuple(shlex.split(job["spec"]["entrypoint"])) == WORDS


def test_no_training_is_placed_on_the_head() -> None:
    parameters = make_job()["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert (parameters["num-cpus"], parameters["num-gpus"]) == ("0", "0")


def test_all_values_of_ray_start_are_texts() -> None:
    cluster = make_job()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_workers_have_the_nodes_gpus_and_memory() -> None:
    job = make_job()
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    (container,) = pods(job)[1]["containers"]
    # Memory for the workers and /dev/shm, which counts as memory of the pod.
    wanted = {"cpu": "64", "memory": "110Gi", "nvidia.com/gpu": "8"}
    assert container["resources"]["limits"] == wanted


def test_a_command_on_cpus_asks_for_no_gpus() -> None:
    job = make_job(gpus_per_node=0, num_nodes=1)
    (container,) = pods(job)[1]["containers"]
    assert container["resources"]["limits"] == {"cpu": "64", "memory": "102Gi"}


def test_dev_shm_holds_the_object_store_and_nccl() -> None:
    job = make_job()
    groups = job["spec"]["rayClusterSpec"]
    for group, pod in zip(
        [groups["headGroupSpec"], *groups["workerGroupSpecs"]], pods(job), strict=True
    ):
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        disk = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert disk["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        assert int(disk["sizeLimit"].removesuffix("Gi")) * 2**30 == store + 8 * 2**30
        claim = volumes[mounts["/shared/iiet"]]["persistentVolumeClaim"]
        assert claim == {"claimName": "disk"}


def test_variables_come_from_the_secret_and_the_workspace_is_named() -> None:
    for pod in pods(make_job()):
        environment = {entry.pop("name"): entry for entry in pod["containers"][0]["env"]}
        key = {"name": "keys", "key": "HF_TOKEN"}
        assert environment["HF_TOKEN"] == {"valueFrom": {"secretKeyRef": key}}
        assert environment["IIET_WORKSPACE"] == {"value": "/shared/iiet"}


def test_a_pod_that_ends_has_time_for_a_checkpoint() -> None:
    job = make_job()
    for pod in pods(job):
        environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0)
        assert 60 < drain < pod["terminationGracePeriodSeconds"]
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": str(drain)}


def test_a_failed_job_starts_again_and_a_finished_cluster_ends() -> None:
    spec = make_job()["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["iiet-sweep_Threshold", "a" * 80, "iiet-" + "x" * 41 + "-y"])
def test_the_name_is_one_that_kubernetes_takes(name: str) -> None:
    found = make_job(name=name)["metadata"]["name"]
    assert len(found) <= 47
    assert found == found.lower().strip("-").replace("_", "-")
