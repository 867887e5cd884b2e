"""Connect the workers of a training job without opening a port to the network.

Ray lets the first worker listen on every address of its machine, without a secret, even where it
is the only one. Here a single worker opens nothing. Workers of one machine find each other through
a file that only this user can read, and talk over loopback. Workers of several machines use Ray's
way, because they must reach each other over the network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from orchestrator.cluster.preemption import own_node
from orchestrator.workspace.files import ScratchFolder, make_scratch_folder

# isort: split
import ray
import ray.train.torch

_RayBackend: Any = ray.train.torch.TorchConfig().backend_cls

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables for the network interface of PyTorch's backends; a user's own value stays."""

DELETE_SECONDS = 5.0

_store_folder: ScratchFolder | None = None
"""Folder of the file store, in the process of the first worker."""


@dataclass
class PrivateTorchConfig(ray.train.torch.TorchConfig):
    """A process group that is closed to other machines if all of its workers are on this one."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets it up, inside Ray's controller of the job."""
        return _PrivateBackend


class _PrivateBackend(_RayBackend):  # type: ignore[misc]
    """Sets the group up when the workers have started, and removes it before they end."""

    _has_store = False

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:
            return
        if len(set(worker_group.execute(own_node))) > 1:
            super().on_start(worker_group, backend_config)
            return
        self._has_store = True
        path = worker_group.execute_single(0, _make_store)
        joining = [
            worker_group.execute_single_async(
                rank,
                _join,
                rank,
                path=path,
                backend=backend_config.backend,
                size=len(worker_group),
                timeout=timedelta(seconds=backend_config.timeout_s),
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        if self._has_store:
            # Behind the end of the group, which may wait for ever for a worker that has failed.
            # Then the folder stays until another process makes one.
            deletion = worker_group.execute_single_async(0, _delete_store)
            ray.wait([deletion], timeout=DELETE_SECONDS)


def _make_store() -> str:
    global _store_folder
    _store_folder = make_scratch_folder()
    return str(_store_folder.folder / "store")


def _delete_store() -> None:
    if _store_folder:
        _store_folder.delete()


def _join(rank: int, *, path: str, backend: str, size: int, timeout: timedelta) -> None:
    for variable in INTERFACE_VARIABLES:
        os.environ.setdefault(variable, _loopback())
    store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _loopback() -> str:
    """Return the name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"
