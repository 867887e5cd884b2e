"""Refuse a Ray cluster that cannot be joined, in a sentence and within half a minute.

Ray itself tries for 40 seconds or longer where nothing answers, or where something else does.
"""

from __future__ import annotations

import os
import re
import socket

import psutil

from orchestrator.cluster.shared_memory import (
    OBJECT_STORE_BYTES,
    check_shared_memory,
    free_shared_memory,
)
from orchestrator.settings.cluster import ADDRESS_VARIABLE, AUTO, LOCAL
from orchestrator.workspace.errors import UserError, first_line

CONNECT_SECONDS = 5.0
# Ray's head node speaks gRPC, that is HTTP/2: both sides begin with a frame of their settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER_BYTES = 9
_FRAME_TYPE_AT, _SETTINGS_FRAME = 3, 4
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


def check_ray_can_run(address: str) -> None:
    """Check what can be known in seconds, before anything is prepared for Ray.

    Here it needs shared memory. A cluster's head node must answer, and one of its nodes must be
    this machine.

    Raises:
        UserError: Says what is wrong.
    """
    if address == LOCAL:
        check_shared_memory(OBJECT_STORE_BYTES, free_shared_memory())
        return
    check_reachable(address)
    # A command talks to the cluster through the node of its own machine. Ray looks for it for a
    # minute.
    if not any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        raise UserError(_not_a_node(address))


def check_reachable(address: str) -> None:
    """Check that the head node of a Ray cluster answers.

    Raises:
        UserError: Says what is wrong with the address.
    """
    host, _, port = address.rpartition(":")
    if not host:
        return  # `auto`: Ray looks for a cluster on this machine.
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                _check_protocol(connection, address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"no Ray cluster answers at {address} ({reason}); {_ADVICE}") from None


_ADVICE = (
    f"start it (`ray start --head`), correct cluster.address or {ADDRESS_VARIABLE}, or set "
    f"cluster.address={LOCAL} to use this machine"
)


def _check_protocol(connection: socket.socket, address: str) -> None:
    connection.sendall(_HELLO)
    answer = b""
    try:
        while len(answer) < _FRAME_HEADER_BYTES and (received := connection.recv(64)):
            answer += received
    except TimeoutError:
        pass
    if len(answer) < _FRAME_HEADER_BYTES or answer[_FRAME_TYPE_AT] != _SETTINGS_FRAME:
        raise UserError(f"what answers at {address} is no Ray cluster; {_ADVICE}")


def joining_problem(error: BaseException, address: str) -> str:
    """Say in one sentence why Ray could not join a cluster.

    Args:
        error: What `ray.init` raised.
    """
    texts = []
    cause: BaseException | None = error
    while cause:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    text = "\n".join(texts)
    versions = _VERSIONS.findall(text)
    if "Version mismatch" in text and len(versions) > 1:
        (ray, python), (own_ray, own_python) = versions[:2]
        return (
            f"the cluster at {address} runs Ray {ray} and Python {python}, and this command "
            f"Ray {own_ray} and Python {own_python}; install the same versions on all nodes"
        )
    if "Unauthenticated" in text or "AuthenticationError" in text:
        return (
            f"the cluster at {address} asks for another token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to the token that the cluster was started with"
        )
    if "No node info found" in text:
        return _not_a_node(address)
    if "Could not find any running Ray instance" in text:
        return _not_a_node(AUTO)
    return f"the Ray cluster at {address} cannot be joined ({first_line(error)}); {_ADVICE}"


def _not_a_node(address: str) -> str:
    if address == AUTO:
        return f"no Ray cluster runs on this machine; {_ADVICE}"
    return (
        f"this machine is no node of the cluster at {address}; run the command on one of its "
        f"nodes, or `ray start --address {address}` here first"
    )
