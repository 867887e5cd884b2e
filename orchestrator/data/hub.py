"""Whether the Hugging Face hub can be reached, asked once and briefly.

The hub's libraries retry for 23 seconds per data set before they give up, and read `HF_HUB_OFFLINE`
once, when they are imported. So a stage asks here first, and works offline unless it has a reason
not to: nothing is then looked up, and what lies in the local cache is still found.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from orchestrator.workspace.credentials import mask_secrets
from orchestrator.workspace.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"
PROBE_SECONDS = 1.5

_FLAG = "HF_HUB_OFFLINE"
_READERS = ("huggingface_hub.constants", "datasets.config")
_TRUE = {"1", "ON", "YES", "TRUE"}


def hub_problem() -> str | None:
    """Return why the hub cannot be reached, in a few words; None if it seems to be there."""
    if os.environ.get(_FLAG, "").upper() in _TRUE:
        return f"{_FLAG} is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None  # reached another way than by name; the client reports its own failure
    address = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    try:
        endpoint = urlsplit(address)
        host = endpoint.hostname or ""
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    except ValueError as error:
        return mask_secrets(f"HF_ENDPOINT={address} is no address ({error})")
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def require_hub(wanted: str) -> None:
    """Refuse at once what needs the hub when it cannot be reached.

    Raises:
        UserError: If it cannot.
    """
    problem = hub_problem()
    if problem:
        raise UserError(
            f"{wanted} needs the hub: {problem}; use data.source=files with files of this machine, "
            "or data.source=python"
        )


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's libraries from the network until the block ends, imported before or within."""
    before = os.environ.get(_FLAG)
    _set_flag("1")
    try:
        yield
    finally:
        _set_flag(before)


def _set_flag(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FLAG, None)
    else:
        os.environ[_FLAG] = value
    for name in _READERS:
        if module := sys.modules.get(name):
            setattr(module, _FLAG, (value or "").upper() in _TRUE)
