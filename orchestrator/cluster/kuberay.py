"""Write a RayJob for KubeRay.

The head pod has no GPUs and runs the command. Worker pods run the trainings. When a worker pod has
to end, Ray tells its training, which saves a checkpoint; the pod ends after that. A job that failed
starts again on a new cluster and resumes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from orchestrator.cluster.deployment import GRACE_SECONDS, OBJECT_STORE_BYTES, Deployment
from orchestrator.workspace.folders import ENVIRONMENT_NAME

DRAIN_SECONDS = GRACE_SECONDS - 30
"""Kubernetes kills what is left of a pod after the grace."""
MAX_RESTARTS = 3
HEAD_CPUS = 8
HEAD_GIBIBYTES = 32
MAX_NAME_CHARACTERS = 47
"""KubeRay adds to the name, and Kubernetes takes 63."""


def ray_job(
    deployment: Deployment, *, image: str, claim: str, secret: str | None = None
) -> dict[str, Any]:
    """Return the RayJob as plain values.

    Args:
        image: Container image with this package and its extras `cluster` and `gpu`.
        claim: Name of the PersistentVolumeClaim (ReadWriteMany) of the workspace.
        secret: Name of the Secret that holds the deployment's variables.
    """
    name = re.sub(r"[^a-z0-9]+", "-", deployment.name.lower())[:MAX_NAME_CHARACTERS].strip("-")
    environment: list[dict[str, Any]] = [
        {"name": ENVIRONMENT_NAME, "value": deployment.workspace},
        {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(DRAIN_SECONDS)},
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}
            for name in deployment.variables
        ),
    ]
    gpus, store = deployment.gpus_per_node, str(OBJECT_STORE_BYTES)
    limits = {"cpu": str(deployment.cpus_per_node), "memory": f"{deployment.total_gibibytes}Gi"}
    if gpus:
        limits["nvidia.com/gpu"] = str(gpus)
    worker_pod = _pod(image, claim, deployment, environment, limits)
    head_limits = {"cpu": str(HEAD_CPUS), "memory": f"{HEAD_GIBIBYTES}Gi"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": shlex.join(deployment.words),
            "runtimeEnvYAML": f'env_vars: {{RAY_JOB_STOP_WAIT_TIME_S: "{DRAIN_SECONDS}"}}',
            "shutdownAfterJobFinishes": True,
            "backoffLimit": MAX_RESTARTS,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # No worker of a training is placed on the head.
                    "rayStartParams": {
                        "num-cpus": "0",
                        "num-gpus": "0",
                        "object-store-memory": store,
                    },
                    "template": _pod(image, claim, deployment, environment, head_limits),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": deployment.num_nodes,
                        "minReplicas": deployment.num_nodes,
                        "maxReplicas": deployment.num_nodes,
                        "rayStartParams": {"num-gpus": str(gpus), "object-store-memory": store},
                        "template": worker_pod,
                    }
                ],
            },
        },
    }


def to_yaml(job: Mapping[str, Any]) -> str:
    """Return a RayJob as a file for `kubectl apply`."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
            return True  # What stands twice is written twice.

    return yaml.dump(job, Dumper=Dumper, sort_keys=False, width=math.inf)


def _pod(
    image: str,
    claim: str,
    deployment: Deployment,
    environment: list[dict[str, Any]],
    limits: dict[str, str],
) -> dict[str, Any]:
    size = f"{-(-deployment.shared_bytes // 2**30)}Gi"
    container = {
        "name": "ray",
        "image": image,
        "env": environment,
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "workspace", "mountPath": deployment.workspace},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "spec": {
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [container],
            "volumes": [
                {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size}},
            ],
        }
    }
