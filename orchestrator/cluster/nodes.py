"""The nodes of the Ray that runs."""

from __future__ import annotations

from typing import Any

import orchestrator.cluster  # noqa: F401 - it sets the environment that Ray reads when imported
from orchestrator.planning.nodes import Node

# isort: split
import ray


def alive_nodes() -> tuple[Node, ...]:
    """Return the nodes that have CPUs or GPUs."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [
        Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in found
        if node["Alive"]
    ]
    return tuple(node for node in nodes if node != Node(0))
