"""Check once, quickly, whether the Hugging Face hub can be reached, or work offline.

The hub's libraries retry for 23 seconds per data set before they give up, and they read
`HF_HUB_OFFLINE` only when they are imported. Offline, the local cache still works.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from orchestrator.workspace.errors import UserError, mask_secrets

DEFAULT_ENDPOINT = "https://huggingface.co"
PROBE_SECONDS = 1.5
DRY_RUN = "a dry run downloads nothing"

_FLAG = "HF_HUB_OFFLINE"
_MODULES_WITH_FLAG = ("huggingface_hub.constants", "datasets.config")
_TRUE = {"1", "ON", "YES", "TRUE"}
_reasons: list[str] = []
"""Those of the blocks of `offline` that run."""


def hub_problem() -> str | None:
    """Return why the hub cannot be reached, in a few words; None if it seems reachable."""
    if os.environ.get(_FLAG, "").upper() in _TRUE:
        return _reasons[0] if _reasons else f"{_FLAG} is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None  # a direct connection proves nothing; the client reports its own failure
    address = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    try:
        endpoint = urlsplit(address)
        host = endpoint.hostname or ""
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    except ValueError as error:
        return mask_secrets(f"HF_ENDPOINT={address} is not a valid address ({error})")
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def require_hub(wanted: str) -> None:
    """Raise a `UserError` at once if the hub, which `wanted` needs, cannot be reached."""
    problem = hub_problem()
    if problem:
        raise UserError(
            f"{wanted} needs the hub: {problem}; use data.source=files with files of this machine, "
            "or data.source=python"
        )


@contextmanager
def offline(reason: str = "") -> Iterator[None]:
    """Keep the hub's libraries off the network inside the block, also if already imported.

    `reason` says why, such as `DRY_RUN`.
    """
    before = os.environ.get(_FLAG)
    _reasons.append(reason or f"{_FLAG} is set")
    _set_flag("1")
    try:
        yield
    finally:
        _set_flag(before)
        _reasons.pop()


def _set_flag(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FLAG, None)
    else:
        os.environ[_FLAG] = value
    for name in _MODULES_WITH_FLAG:
        if module := sys.modules.get(name):
            setattr(module, _FLAG, (value or "").upper() in _TRUE)
