"""The address of the Ray cluster that a command uses.

It is not part of the settings because importing those imports PyTorch.
"""

from __future__ import annotations

import os
import re

from orchestrator.workspace.errors import UserError, quoted

LOCAL = "local"
"""Address of a Ray that the command starts for itself."""
AUTO = "auto"
"""Address of a cluster that this machine is part of."""
ADDRESS_VARIABLE = "RAY_ADDRESS"
MAX_PORT = 65535

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", flags=re.ASCII)


def chosen_address(setting: str | None) -> str:
    """Return the setting, else `RAY_ADDRESS`, else `local`.

    Raises:
        UserError: If `RAY_ADDRESS` is no address of a cluster.
    """
    if setting is not None:
        return setting
    found = os.environ.get(ADDRESS_VARIABLE) or LOCAL
    if problem := address_problem(found):
        raise UserError(f"{ADDRESS_VARIABLE}: {problem}; got {quoted(found)}")
    return found


def address_problem(address: str) -> str | None:
    """Return why an address cannot be joined, or None."""
    if address.startswith("ray://"):
        return (
            "ray:// is for Ray Client, which is not made for Ray Train and Ray Tune; run the "
            "command on a machine of the cluster, with HOST:PORT of its head node (usually port "
            "6379)"
        )
    found = _HOST_AND_PORT.fullmatch(address)
    if address in (LOCAL, AUTO) or (found and 0 < int(found[2]) <= MAX_PORT):
        return None
    return (
        f"an address is HOST:PORT of a cluster's head node (usually port 6379), {AUTO} or {LOCAL}"
    )
