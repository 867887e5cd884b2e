"""A command and the nodes that it gets: what a job file for SLURM or KubeRay says."""

from __future__ import annotations

from dataclasses import dataclass

GRACE_SECONDS = 180
"""From a node's notice to its end: a checkpoint of several GiB is written to a shared disk."""
OBJECT_STORE_BYTES = 2 * 2**30
"""Data does not travel through Ray; its own default is 30% of a node's memory."""
SHARED_BYTES_PER_GPU = 2**30
"""What NCCL may take of /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A command on nodes of one kind, each with one Ray."""

    name: str
    words: tuple[str, ...]
    """The command with its options, `iiet-orch` first."""
    workspace: str
    """Absolute path of the workspace, the same on all nodes."""
    num_nodes: int
    gpus_per_node: int
    """0 for a command on CPUs."""
    cpus_per_node: int
    memory_bytes: int
    """Of each node, for workers and the command; /dev/shm not counted."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that the command and its workers get."""

    @property
    def shared_bytes(self) -> int:
        """Size of a node's /dev/shm: the object store, and NCCL's part."""
        return OBJECT_STORE_BYTES + self.gpus_per_node * SHARED_BYTES_PER_GPU

    @property
    def total_gibibytes(self) -> int:
        """Memory of a node with its /dev/shm, rounded up."""
        return -(-(self.memory_bytes + self.shared_bytes) // 2**30)
