"""The nodes of the Ray that runs, and what is checked before they get work.

All nodes must see one workspace, on a file system whose locks reach all of them: otherwise two runs
could write to one folder. They need the same code and libraries, and shared memory for Ray's object
store. For the workspace, this process leaves a random text there and locks its file; each node
reads it and tries the lock.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from orchestrator.planning.machine import Node
from orchestrator.terminal.render import format_bytes
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.files import write_text
from orchestrator.workspace.locks import lock_descriptor
from orchestrator.workspace.provenance import (
    KEY_LENGTH,
    NOT_INSTALLED,
    environment,
    extension_packages,
)

ANSWER_SECONDS = 25.0
"""Longest wait for the nodes, each of which starts a process."""
SEEN_SECONDS = 5.0
"""How long the file is looked for; network file systems show it late."""
POLL_SECONDS = 0.2
CODE = "the code of iiet-orch"
SHARED_MEMORY = Path("/dev/shm")
SLOW_STORAGE_SWITCH = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Variable that lets Ray, and the checks here, accept an object store on a disk."""


def alive_nodes() -> tuple[Node, ...]:
    """Return the nodes that have CPUs or GPUs."""
    found = [node["Resources"] for node in _alive()]
    return tuple(Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in found)


def _alive() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [n for n in nodes if n["Alive"] and {"CPU", "GPU"} & set(n["Resources"])]


def check_nodes(folder: Path | None = None) -> None:
    """Check all nodes with CPUs or GPUs at the same time.

    Args:
        folder: The workspace, or a folder in it; not checked when unset.

    Raises:
        UserError: Names the first node that cannot be used, what differs and what to do.
        RunFailed: If a node does not answer.
    """
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes, ours = _alive(), versions()
    if not nodes:
        return  # They may join later.
    with locked_text(folder.absolute() if folder else None) as probe:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(_look_around)
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=there).remote(*probe)] = node
        answered, late = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_SECONDS)
        if late:
            raise RunFailed(
                f"{len(late)} of {len(asked)} nodes did not answer within {ANSWER_SECONDS:g} s; "
                "see whether their file systems hang and whether they have memory for a process"
            )
        for answer in answered:
            place = f"the node {asked[answer]['NodeManagerAddress']}"
            try:
                problem, theirs, memory = ray.get(answer)
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # The node has left; jobs are placed on the others.
            except ray.exceptions.RayError as error:
                reason = first_line(error, with_type=True)
                if "No module named" in str(error):
                    problem = "lacks iiet-orch or a library of it"
                else:
                    problem = f"cannot run a process of iiet-orch ({reason})"
                raise UserError(f"{place} {problem}; install the same on all nodes") from None
            if problem:
                raise UserError(
                    f"{place} {problem} in {folder}; the workspace must be one folder on a file "
                    "system that all nodes share, under the same path and with locks (NFS 4, "
                    "Lustre with -o flock); choose it with --workspace"
                )
            check_versions(theirs, ours, place)
            store = int(asked[answer]["Resources"].get("object_store_memory", 0))
            check_shared_memory(store, memory, place)


@contextmanager
def locked_text(folder: Path | None) -> Iterator[tuple[Path | None, str]]:
    """Leave a random text in a folder, and hold the lock of its file; yield its path and it."""
    text = secrets.token_hex(16)
    if folder is None:
        yield None, text
        return
    path = folder / f".nodes-{text[:8]}"
    write_text(path, text)
    descriptor = os.open(path, os.O_RDWR)
    try:
        try:
            lock_descriptor(descriptor)
        except OSError as error:
            raise UserError(
                f"the file system of {folder} does not lock files ({error.strerror}), and two "
                "runs could write to one folder; mount it with locks (Lustre: -o flock), or "
                "choose another place with --workspace"
            ) from None
        yield path, text
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _look_around(path: Path | None, text: str) -> tuple[str, dict[str, str], int | None]:
    """Run on a node: return why it cannot share the workspace, its versions, its shared memory."""
    return workspace_problem(path, text) if path else "", versions(), shared_memory().total


def workspace_problem(path: Path, text: str) -> str:
    """Return why the file that another machine has written and locked is not shared; or nothing."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > deadline:
            return "does not see what this machine writes"
        time.sleep(POLL_SECONDS)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        return f"cannot write files ({error.strerror})"
    try:
        lock_descriptor(descriptor)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"cannot lock files ({error.strerror})"
    finally:
        os.close(descriptor)
    return "gets locks that this machine holds"


def versions() -> dict[str, str]:
    """Return what must be the same on all nodes: versions of libraries, and a hash of the code."""
    found = environment()
    del found["machine"]
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("iiet/**/*.py"), *root.glob("orchestrator/**/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {**found, **extension_packages(), CODE: digest.hexdigest()[:KEY_LENGTH]}


def check_versions(theirs: dict[str, str], ours: dict[str, str], place: str) -> None:
    """Compare the versions of a node with those of this machine.

    Raises:
        UserError: Names what differs first.
    """
    for name, version in ours.items():
        other = theirs.get(name, NOT_INSTALLED)
        if other == version:
            continue
        if other == NOT_INSTALLED:
            problem = f"{place} lacks the package {name}, and this machine has version {version}"
        elif version == NOT_INSTALLED:
            problem = f"this machine lacks the package {name}, and {place} has version {other}"
        else:
            problem = f"{place} has {name} {other}, and this machine has {version}"
        raise UserError(f"{problem}; install the same on all nodes")


class Bytes(NamedTuple):
    """Size of a place, and what is free of it; None on systems without it."""

    total: int | None
    free: int | None


def shared_memory() -> Bytes:
    """Return this machine's shared memory."""
    if not SHARED_MEMORY.is_dir():
        return Bytes(None, None)
    found = psutil.disk_usage(str(SHARED_MEMORY))
    return Bytes(found.total, found.free)


def check_shared_memory(needed: int, available: int | None, place: str = "this machine") -> None:
    """Refuse an object store that does not fit into shared memory.

    In a container there is often too little: Docker's default is 64 MB. Ray then puts the store on
    the disk and says so in a log only, and NCCL, which needs shared memory too, fails later.

    Args:
        needed: Bytes of the object store.
        available: Bytes of shared memory; None if the system has none.

    Raises:
        UserError: If it does not fit.
    """
    if available is None or needed <= available or os.environ.get(SLOW_STORAGE_SWITCH):
        return
    raise UserError(
        f"Ray's object store takes {format_bytes(needed)}, and {SHARED_MEMORY} of {place} has "
        f"{format_bytes(available)}; start the container with --shm-size=1g or more (Kubernetes: "
        f"an emptyDir with medium Memory), or set {SLOW_STORAGE_SWITCH}=1 to put it on the disk"
    )
