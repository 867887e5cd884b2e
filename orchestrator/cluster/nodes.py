"""The nodes of the Ray that runs, and the wait for nodes with GPUs that join it later."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import orchestrator.cluster  # noqa: F401 - it sets the environment that Ray reads when imported
from orchestrator.planning.machine import Node, describe_nodes
from orchestrator.terminal.stop import wait_interruptibly

# isort: split
import ray
from ray.util.placement_group import placement_group, remove_placement_group

PLACEMENT_SECONDS = 2.0
"""Ray places a job on nodes that are free within this time."""


def alive_nodes() -> tuple[Node, ...]:
    """Return the nodes that have CPUs or GPUs."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [
        Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in found
        if node["Alive"]
    ]
    return tuple(node for node in nodes if node != Node(0))


def wait_for_gpus(num_gpus: float, note: Callable[[str], None] | None = None) -> None:
    """Wait until a job's GPUs are free, each with a CPU; Ray's autoscaler starts nodes for them.

    Args:
        num_gpus: GPUs of the job, or a share of one; 0 returns at once.
        note: Called with a sentence if there is something to wait for.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM.
    """
    if not num_gpus:
        return
    num_workers = math.ceil(num_gpus)
    group = placement_group([{"CPU": 1, "GPU": num_gpus / num_workers}] * num_workers)
    try:
        if not group.wait(PLACEMENT_SECONDS):
            nodes = describe_nodes(alive_nodes())
            text = f"waiting for {num_gpus:g} free GPUs; the cluster has {nodes}"
            wait_interruptibly(partial(group.wait, 0), begin=partial(note, text) if note else None)
    finally:
        remove_placement_group(group)
