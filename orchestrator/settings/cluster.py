"""Settings of the Ray cluster, workers, GPUs and storage."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from orchestrator.settings.section import Section
from orchestrator.workspace.errors import has_secret, is_secret_name
from orchestrator.workspace.layout import address_problem, chosen_address

_VARIABLE = re.compile(r"[A-Za-z_]\w*(\*|=.*)?", flags=re.ASCII | re.DOTALL)


class ClusterSettings(Section):
    """The Ray cluster, workers, GPUs and storage."""

    address: str | None = None
    """Ray cluster to join: `HOST:PORT` of its head node, `auto` for one that this machine is part
    of, or `local` to start a Ray for this command only (default: `RAY_ADDRESS`, else `local`)."""
    env: tuple[str, ...] = ("NCCL_*", "HF_TOKEN", "AWS_*")
    """Environment variables that all processes of a joined cluster get from the command's own:
    names, or patterns such as `AWS_*`. `NAME=value` sets a value, and on this machine, too. Keys
    and tokens are given by name only: settings are stored with every run, their values are not."""
    num_workers: int = Field(default=1, gt=0)
    """Data-parallel workers of a training job; with GPUs, one each."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs of a training job; 0 trains on CPUs."""
    device: str | None = None
    """Device of a command that only measures: `cpu`, `cuda`, or `cuda:1` for the second GPU of this
    machine (default: as `num_gpus` says, else a GPU if this machine has one)."""
    min_gpus: int | None = Field(default=None, gt=0)
    """Fewest GPUs of a training job that may lose nodes: it goes on with those that are left, and
    takes others, up to `num_gpus`, when they join (default: always `num_gpus`)."""
    wait_for_gpus: bool = False
    """Wait, before a job starts, until its GPUs are free, also those of nodes that join the cluster
    later; otherwise a job that the nodes cannot hold is refused."""
    storage: str | None = None
    """URI of a second place for pretraining checkpoints, such as `s3://bucket/runs`. They are
    copied there during training, and fetched from there if the workspace has none."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several workers share a model. `ddp`: each holds all of it; `fsdp`: each holds a part of
    its weights, gradients and moments, which needs less memory and more traffic."""
    num_shards: int | None = Field(default=None, gt=1)
    """With `fsdp`, workers that share one copy of the model (default: all). A smaller number, which
    divides that of the workers, makes several copies (HSDP): weights are gathered among the workers
    of a copy only, such as the GPUs of a node, and gradients are averaged over all copies."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts of a training job from its newest checkpoint after a worker died. The count begins
    anew when the job has written another checkpoint since the last one."""
    collective_timeout_seconds: int = Field(default=600, gt=0)
    """Longest wait of a worker for the others in a step; then the job fails, and starts again from
    its newest checkpoint. Saving, uploads and downloads may take longer."""
    node_wait_minutes: float | None = Field(default=None, ge=0)
    """Longest wait of a job that has once started for nodes that replace lost ones; unset, it waits
    for ever."""

    @property
    def ray_address(self) -> str:
        """The address in force: the setting, else `RAY_ADDRESS`, else `local`.

        Raises:
            UserError: If `RAY_ADDRESS` is no address of a cluster.
        """
        return chosen_address(self.address)

    @field_validator("address")
    @classmethod
    def _refuse_other_addresses(cls, address: str | None) -> str | None:
        if address is not None and (problem := address_problem(address)):
            raise ValueError(problem)
        return address

    @field_validator("device")
    @classmethod
    def _refuse_other_devices(cls, device: str | None) -> str | None:
        if device is not None and (problem := device_problem(device)):
            raise ValueError(problem)
        return device

    def shards_of(self, num_workers: int) -> int | None:
        """Workers of a trial that share one copy of its model; None for all.

        A trial may have fewer workers than a training job, among which `num_shards` are too many.
        """
        shards = self.num_shards
        return shards if shards and num_workers % shards == 0 else None

    @property
    def fewest_gpus(self) -> int:
        """GPUs with which a training job can start."""
        return self.min_gpus or self.num_gpus

    @field_validator("min_gpus")
    @classmethod
    def _refuse_more_than_all(cls, fewest: int | None, info: ValidationInfo) -> int | None:
        if fewest and fewest > info.data.get("num_gpus", fewest):
            raise ValueError(f"{fewest} is more than cluster.num_gpus={info.data['num_gpus']}")
        return fewest

    @field_validator("parallel")
    @classmethod
    def _refuse_shards_of_variable_number(cls, parallel: str, info: ValidationInfo) -> str:
        if parallel == "fsdp" and info.data.get("min_gpus"):
            raise ValueError(
                "fsdp needs equal shares of a step, and cluster.min_gpus lets the number of "
                "workers vary; take ddp, or leave cluster.min_gpus out"
            )
        return parallel

    @field_validator("num_shards")
    @classmethod
    def _refuse_uneven_copies(cls, shards: int | None, info: ValidationInfo) -> int | None:
        if shards is None:
            return shards
        if info.data.get("parallel") == "ddp":
            raise ValueError("it needs cluster.parallel=fsdp, which shares a model")
        workers = info.data.get("num_gpus") or info.data.get("num_workers") or shards
        if workers % shards:
            raise ValueError(f"{shards} does not divide the {workers} workers of a training job")
        return shards

    @field_validator("env")
    @classmethod
    def _refuse_other_variables(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            if problem := variable_problem(entry):
                raise ValueError(problem)
        return entries

    @field_validator("storage")
    @classmethod
    def _refuse_secrets(cls, storage: str | None) -> str | None:
        if problem := storage_problem(storage or ""):
            raise ValueError(problem)
        return storage


def device_problem(device: str) -> str | None:
    """Return why this is no name of a device, or None."""
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        return None
    return "a device is cpu, cuda, or cuda:N for one of several GPUs"


def variable_problem(entry: str) -> str | None:
    """Return why an entry of `cluster.env` is refused, or None."""
    name, _, value = entry.partition("=")
    if not _VARIABLE.fullmatch(entry):
        return "an entry is the name of a variable, a pattern such as AWS_*, or NAME=value"
    if value and (is_secret_name(name) or has_secret(value)):
        return (
            f"the value of {name} is a secret, and settings are stored with every run; give only "
            "its name, and set it in the environment of the command"
        )
    return None


def storage_problem(uri: str) -> str | None:
    """Return why a storage address is refused (it holds a secret), or None."""
    if not has_secret(uri):
        return None
    return (
        "the address holds a password or a key, and settings are stored with every run; leave it "
        "out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment (for GCS "
        "GOOGLE_APPLICATION_CREDENTIALS)"
    )
