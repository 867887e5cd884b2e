"""The nodes that a command needs, from its settings: what SLURM and KubeRay are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.cluster.deployment import Deployment
from orchestrator.pipelines.submitting import shared_workspace
from orchestrator.pipelines.training_dry_runs import plan_pretrain
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.settings import Settings
from orchestrator.workspace.errors import UserError

GPU_PROCESS_BYTES = 4 * 2**30
"""Roughly what a worker with a GPU takes of its node's memory for Python, PyTorch and CUDA."""
COMMAND_BYTES = 8 * 2**30
"""The command itself, Ray and the node's file cache."""
WEIGHT_BYTES = 4


def plan_deployment(
    words: Sequence[str],
    settings: Settings,
    *,
    workspace: Path | None,
    gpus_per_node: int,
    cpus_per_node: int,
    variables: Sequence[str] = (),
) -> Deployment:
    """Return the nodes for a command.

    Args:
        words: The command and its options, without `iiet-orch`.
        workspace: What the command's own option says.
        gpus_per_node, cpus_per_node: What a node has.
        variables: Names of environment variables that the command and its workers get.

    Raises:
        UserError: If the workspace is not shared, or the nodes cannot hold the workers.
    """
    space = shared_workspace(workspace)
    cluster = settings.cluster
    num_gpus, num_workers = cluster.num_gpus, cluster.num_gpus or cluster.num_workers
    per_node = min(num_workers, gpus_per_node if num_gpus else cpus_per_node)
    if num_workers % per_node:
        what, option = ("GPUs", "--gpus-per-node") if num_gpus else ("workers", "--cpus-per-node")
        raise UserError(
            f"{num_workers} {what} cannot be shared evenly by nodes of {per_node}; type {option} N "
            f"with a divisor of {num_workers}"
        )
    training = plan_pretrain(settings, workspace=space).training
    waiting = ("--set", "cluster.wait_for_gpus=true") if num_gpus else ()
    return Deployment(
        name=f"iiet-{words[0]}",
        words=("iiet-orch", *words, *waiting),
        workspace=str(space),
        num_nodes=num_workers // per_node,
        gpus_per_node=per_node if num_gpus else 0,
        cpus_per_node=cpus_per_node,
        memory_bytes=COMMAND_BYTES + node_bytes(training, per_node),
        variables=tuple(variables),
    )


def node_bytes(training: PlannedTraining, num_workers: int) -> int:
    """Return the memory of a node, not of its GPUs, that workers of a training take."""
    if not training.on_gpus:
        return num_workers * training.worker_bytes
    # A worker that resumes holds its model and the checkpoint's; the first one writes a copy.
    two_models = 2 * WEIGHT_BYTES * training.num_parameters
    return num_workers * (GPU_PROCESS_BYTES + two_models) + 2 * training.checkpoint_bytes
