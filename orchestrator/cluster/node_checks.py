"""Check the nodes of a cluster before they get work.

All nodes must see one workspace, on a file system whose locks reach all of them: otherwise two runs
could write to one folder. They need the same code and libraries, and shared memory for Ray's object
store. For the workspace, this process leaves a random text there and locks its file. Each node
reads the text, tries the lock, and answers with a file of its own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orchestrator.cluster  # sets the environment that Ray reads when imported
from orchestrator.cluster.shared_memory import check_shared_memory, total_shared_memory
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.files import write_text
from orchestrator.workspace.locks import lock_descriptor
from orchestrator.workspace.provenance import (
    KEY_LENGTH,
    NOT_INSTALLED,
    environment,
    extension_packages,
)

# isort: split
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_SECONDS = 25.0
"""Longest wait for the nodes, each of which starts a process."""
SEEN_SECONDS = 5.0
"""How long a file of another node is looked for; network file systems show it late."""
POLL_SECONDS = 0.2
CODE = "the code of iiet-orch"


@dataclass(frozen=True)
class NodeReport:
    """What a node found."""

    workspace_problem: str
    """Why it cannot share the workspace, without the subject; empty if it can."""
    versions: dict[str, str]
    """Versions of Python, libraries and the code, by name."""
    shared_memory: int | None
    """Size of its shared memory in bytes; None if the system has none."""


def check_nodes(folder: Path | None = None) -> None:
    """Check all nodes with CPUs or GPUs at the same time.

    Args:
        folder: The workspace, or a folder in it; not checked when unset.

    Raises:
        UserError: Names the first node that cannot be used, what differs and what to do.
        RunFailed: If a node does not answer.
    """
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {
        node["NodeID"]: node
        for node in found
        if node["Alive"] and {"CPU", "GPU"} & set(node["Resources"])
    }
    if not nodes:
        return  # They may join later.
    folder, ours = folder and folder.absolute(), versions()
    with _shared_text(folder) as text:
        reports = _ask_nodes(list(nodes), folder, text)
        for node_id, report in reports.items():
            address = f"the node {nodes[node_id]['NodeManagerAddress']}"
            if isinstance(report, Exception):
                raise UserError(_error_sentence(report, address))
            problem = report.workspace_problem
            if folder and not problem and not _sees(_folder_of(folder, text) / node_id, text):
                problem = "writes files that this machine does not see"
            if problem:
                raise UserError(_workspace_sentence(problem, address, folder))
            _check_versions(report.versions, ours, address)
            store = int(nodes[node_id]["Resources"].get("object_store_memory", 0))
            check_shared_memory(store, report.shared_memory, address)


def versions() -> dict[str, str]:
    """Return what must be the same on all nodes: versions of libraries, and a hash of the code."""
    found = environment()
    del found["machine"]
    root = Path(str(orchestrator.__path__[0])).parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("iiet/**/*.py"), *root.glob("orchestrator/**/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {**found, **extension_packages(), CODE: digest.hexdigest()[:KEY_LENGTH]}


@contextmanager
def _shared_text(folder: Path | None) -> Iterator[str]:
    """Leave a random text in a folder, and hold the lock of its file; yield the text."""
    text = secrets.token_hex(16)
    if folder is None:
        yield text
        return
    ours = _folder_of(folder, text)
    try:
        write_text(ours / "text", text)
        descriptor = os.open(ours / "text", os.O_RDWR)
        try:
            try:
                lock_descriptor(descriptor)
            except OSError as error:
                raise UserError(
                    f"the file system of {folder} does not lock files ({error.strerror}), and two "
                    "runs could write to one folder; mount it with locks (Lustre: -o flock), or "
                    "choose another place with --workspace"
                ) from None
            yield text
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(ours, ignore_errors=True)


def _folder_of(folder: Path, text: str) -> Path:
    return folder / f".nodes-{text[:8]}"


def _ask_nodes(
    node_ids: list[str], folder: Path | None, text: str
) -> dict[str, NodeReport | Exception]:
    """Return each node's report, or the error of its process; without nodes that have left."""
    remote: Any = ray.remote
    asked = {}
    for node_id in node_ids:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        report = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_report)
        path = _folder_of(folder, text) if folder else None
        asked[report.remote(path, text, node_id)] = node_id
    answered, late = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_SECONDS)
    if late:
        raise RunFailed(
            f"{len(late)} of {len(asked)} nodes did not answer within {ANSWER_SECONDS:g} s; see "
            "whether their file systems hang and whether they have memory for another process"
        )
    reports: dict[str, NodeReport | Exception] = {}
    for answer in answered:
        try:
            reports[asked[answer]] = ray.get(answer)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # The node has left; jobs are placed on the others.
        except ray.exceptions.RayError as error:
            reports[asked[answer]] = error
    return reports


def _report(folder: Path | None, text: str, node_id: str) -> NodeReport:
    """Run on a node: look at the workspace and at this node's libraries and memory."""
    problem = _workspace_problem(folder, text, node_id) if folder else ""
    return NodeReport(problem, versions(), total_shared_memory())


def _workspace_problem(folder: Path, text: str, node_id: str) -> str:
    if not _sees(folder / "text", text):
        return "does not see what this machine writes"
    try:
        descriptor = os.open(folder / "text", os.O_RDWR)
        try:
            lock_descriptor(descriptor)
            return "gets locks that this machine holds"
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
        write_text(folder / node_id, text)
    except OSError as error:
        return f"cannot write and lock files ({error.strerror})"
    return ""


def _sees(path: Path, text: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        try:
            if path.read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _workspace_sentence(problem: str, address: str, folder: Path | None) -> str:
    return (
        f"{address} {problem} in {folder}; the workspace must be one folder on a file system that "
        "all nodes share, under the same path and with locks (NFS 4, Lustre with -o flock); choose "
        "it with --workspace"
    )


def _check_versions(theirs: dict[str, str], ours: dict[str, str], address: str) -> None:
    for name, version in ours.items():
        other = theirs.get(name, NOT_INSTALLED)
        if other == version:
            continue
        if other == NOT_INSTALLED:
            problem = f"{address} lacks the package {name}, and this machine has version {version}"
        elif version == NOT_INSTALLED:
            problem = f"this machine lacks the package {name}, and {address} has version {other}"
        else:
            problem = f"{address} has {name} {other}, and this machine has {version}"
        raise UserError(f"{problem}; install the same on all nodes")


def _error_sentence(error: Exception, address: str) -> str:
    if "No module named" in str(error):
        return f"{address} lacks iiet-orch or a library of it; install the same on all nodes"
    return f"{address} cannot run a process of iiet-orch ({first_line(error, with_type=True)})"
