"""Nodes of a cluster, and how many equal workers find a place on them.

A worker lies on one node, so the sum over a cluster says nothing: two nodes of 3 CPUs hold two
workers of 2 CPUs, not three. A machine without a cluster is one node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_GPU_UNITS = 10_000  # Ray's smallest share of a GPU is a ten-thousandth.


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine."""

    cpus: int
    gpus: int = 0


def num_sharing(gpus: float) -> int:
    """Return how many workers share one GPU if each has this share of it; 1 from 1 GPU on."""
    return max(1, _GPU_UNITS // round(gpus * _GPU_UNITS))


def num_workers_on(node: Node, cpus: int, gpus: float) -> int:
    """Return how many workers a node holds.

    Args:
        cpus: CPUs of each worker.
        gpus: GPUs of each worker: 1, a share of one, or 0.
    """
    by_cpus = node.cpus // cpus
    return min(by_cpus, node.gpus * num_sharing(gpus)) if gpus else by_cpus


def num_places(
    nodes: Sequence[Node], num_workers: int, cpus: int, gpus: float, *, on_one_node: bool = False
) -> int:
    """Return how many jobs find places for all of their workers at the same time.

    Args:
        num_workers: Workers of each job.
        cpus, gpus: As in `num_workers_on`.
        on_one_node: Whether the workers of a job must lie on the same node.
    """
    found = [num_workers_on(node, cpus, gpus) for node in nodes]
    if on_one_node:
        return sum(number // num_workers for number in found)
    return sum(found) // num_workers


def cpus_of_gpu_worker(nodes: Sequence[Node], gpus: float) -> int:
    """Return the CPUs of each worker that has a GPU, or a share of one: at least 1.

    It is the smallest number of CPUs per GPU over the nodes with GPUs, so each of them can use all
    of its GPUs.
    """
    sharing = num_sharing(gpus)
    shares = [node.cpus // (node.gpus * sharing) for node in nodes if node.gpus and node.cpus]
    return max(1, min(shares, default=1))


def cpus_of_cpu_worker(nodes: Sequence[Node], num_workers: int, num_jobs: int) -> int:
    """Return the largest number of CPUs of each worker with which all jobs find places.

    Args:
        num_workers: Workers of each job.
        num_jobs: Jobs that run at the same time.
    """
    most = max(node.cpus for node in nodes)
    fitting = (
        cpus for cpus in range(most, 1, -1) if num_places(nodes, num_workers, cpus, 0) >= num_jobs
    )
    return next(fitting, 1)


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Return such as "4 nodes with 64 CPUs and 8 GPUs each, 1 node with 8 CPUs"."""
    counts = Counter(sorted(nodes, key=lambda node: (-node.gpus, -node.cpus)))
    return ", ".join(
        f"{_count(number, 'node')} with {describe_node(node)}" + " each" * (number > 1)
        for node, number in counts.items()
    )


def describe_node(node: Node) -> str:
    """Return such as "64 CPUs and 8 GPUs", or "8 CPUs"."""
    gpus = f" and {_count(node.gpus, 'GPU')}" if node.gpus else ""
    return f"{_count(node.cpus, 'CPU')}{gpus}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
