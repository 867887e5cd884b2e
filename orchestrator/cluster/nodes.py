"""Check the nodes of a cluster before they get work.

They need the same code and libraries as this machine, and must share one workspace whose locks hold
on all nodes: otherwise two runs could write to one folder.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from orchestrator.cluster.placement import nodes_with_devices
from orchestrator.terminal.stop import POLL_SECONDS
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.locks import lock_descriptor
from orchestrator.workspace.provenance import (
    KEY_LENGTH,
    NOT_INSTALLED,
    environment,
    extension_packages,
)

ANSWER_SECONDS = 25.0
"""Longest wait for the answers of the nodes, each of which starts a process."""
SEEN_SECONDS = 5.0
"""Longest wait of a node for a file, which network file systems show late."""
CODE = "the code of iiet-orch"
INSTALL_THE_SAME = "install the same on all nodes"


def check_nodes(folder: Path | None = None) -> None:
    """Check all nodes with CPUs or GPUs at the same time, and whether they share a folder.

    Raises:
        UserError: If a node cannot be used; names the first one, what differs and what to do. Or
            if the file system has no locks.
        RunFailed: If a node does not answer.
    """
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = nodes_with_devices()
    if not nodes:
        return  # They may join later.
    with locked_file(folder.absolute()) if folder else nullcontext() as probe:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(problem_of_node)
        node_of_answer = {}
        for node in nodes:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = task.options(scheduling_strategy=on_node).remote(probe, versions())
            node_of_answer[answer] = node
        answers = [*node_of_answer]
        answered, late = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS)
        if late:
            raise RunFailed(
                f"{len(late)} of {len(answers)} nodes did not answer within {ANSWER_SECONDS:g} s; "
                "see whether their file systems hang and whether they have memory for a process"
            )
        for answer in answered:
            try:
                problem = ray.get(answer)
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # The node has left; jobs are placed on the others.
            except ray.exceptions.RayError as error:
                reason = first_line(error, with_type=True)
                problem = f"cannot run a process of iiet-orch ({reason}); {INSTALL_THE_SAME}"
            if problem:
                address = node_of_answer[answer]["NodeManagerAddress"]
                raise UserError(f"the node {address} {problem}")


@contextmanager
def locked_file(folder: Path) -> Iterator[Path]:
    """Hold the lock of a new file with a random name in a folder.

    Raises:
        UserError: If the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".nodes-{secrets.token_hex(8)}"
    try:
        with path.open("x") as file:
            lock_descriptor(file.fileno())
            yield path
    except OSError as error:
        raise UserError(
            f"the file system of {folder} does not lock files ({error.strerror}), and two runs "
            "could write to one folder; mount it with locks (Lustre: -o flock), or choose another "
            "folder with --workspace"
        ) from None
    finally:
        path.unlink(missing_ok=True)


def problem_of_node(probe: Path | None, driver_versions: dict[str, str]) -> str:
    """Return why this node cannot work with the driver's machine; empty if it can. Runs on a node.

    Args:
        probe: A file in the workspace that the driver holds locked; None skips this check.
        driver_versions: `versions` of the driver's machine.
    """
    if probe and (problem := _problem_of_folder(probe)):
        return (
            f"{problem} in {probe.parent}; the workspace must be one folder on a file system that "
            "all nodes share, under the same path and with locks (NFS 4, Lustre with -o flock); "
            "choose it with --workspace"
        )
    node_versions = versions()
    for name, driver_version in driver_versions.items():
        version = node_versions.get(name, NOT_INSTALLED)
        if version != driver_version:
            return f"has {name}: {version}, and this machine {driver_version}; {INSTALL_THE_SAME}"
    return ""


def _problem_of_folder(probe: Path) -> str:
    """Return why this node cannot work in the folder of a file that the driver holds locked."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not probe.is_file():
        if time.monotonic() >= deadline:
            return "does not see what this machine writes"
        time.sleep(POLL_SECONDS)
    try:
        with probe.open("r+") as file:
            lock_descriptor(file.fileno())
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"cannot write or lock files ({error.strerror})"
    return "gets locks that this machine holds"


def versions() -> dict[str, str]:
    """Return what must be the same on all nodes: versions of libraries, and a hash of the code."""
    versions_by_name = environment()
    del versions_by_name["machine"]
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("iiet/**/*.py"), *root.glob("orchestrator/**/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {**versions_by_name, **extension_packages(), CODE: digest.hexdigest()[:KEY_LENGTH]}
