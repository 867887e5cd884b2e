"""Ray clusters of their own for tests: of a program, or of pretended GPUs."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType

import psutil

Variables = Mapping[str, str]
NONE: Variables = MappingProxyType({})
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

NODES = """
import sys
import orchestrator.cluster  # sets what Ray reads when it is imported
from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 * 2**20}
head = {**small, "num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args=head)
nodes.add_node(num_cpus=4, num_gpus=2, **small)
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


def listening_addresses() -> dict[int, set[str]]:
    """Return the addresses that this process and its children listen on, by process."""
    addresses = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            sockets = process.net_connections(kind="inet")
            addresses[process.pid] = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return addresses


def environment_without_ray() -> dict[str, str]:
    """Return this process's environment without what a Ray that it has started sets in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def run_driver(
    code: str,
    *arguments: str,
    timeout: float,
    in_scratch: bool = False,
    variables: Variables = NONE,
) -> str:
    """Run a program that starts a cluster of its own; return what it prints.

    Args:
        code: The program, which must end without an error.
        arguments: Its `sys.argv` from 1 on.
        timeout: Longest time in seconds.
        in_scratch: Run it in an empty folder: Ray's workers import from a program's folder first.
        variables: Environment variables for it.
    """
    # Short: a socket's path has little room.
    with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**environment_without_ray(), "RAY_TMPDIR": scratch, **variables},
            cwd=scratch if in_scratch else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@contextmanager
def pretended_cluster() -> Iterator[dict[str, str]]:
    """Start the cluster in a process of its own, and yield the environment of its users."""
    with tempfile.TemporaryDirectory(prefix="iiet-", dir="/tmp") as scratch:
        environment = {
            **environment_without_ray(),
            "RAY_TMPDIR": scratch,  # Short: a socket's path has little room.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "IIET_PRETENDED_GPUS": "1",
        }
        with subprocess.Popen(
            [sys.executable, "-c", NODES],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as nodes:
            try:
                yield {**environment, "RAY_ADDRESS": nodes.stdout.readline().strip()}
            finally:
                nodes.stdin.close()
