"""Settings of the Ray cluster, workers, GPUs and storage."""

from __future__ import annotations

import os
import re
from typing import Literal

from pydantic import Field, StrictFloat, StrictInt, ValidationInfo, field_validator

from orchestrator.settings.section import Section
from orchestrator.workspace.errors import UserError, has_secret, is_secret_name, quoted

LOCAL = "local"
"""Address of a Ray that the command starts for itself."""
AUTO = "auto"
"""Address of a cluster that this machine is part of."""
ADDRESS_VARIABLE = "RAY_ADDRESS"

GpuModel = Literal["A100-40GB", "A100-80GB", "H100", "H200", "L40S", "RTX-4090"]

_VARIABLE = re.compile(r"[A-Za-z_]\w*(\*|=.*)?", flags=re.ASCII | re.DOTALL)


class ClusterSettings(Section):
    """The Ray cluster, workers, GPUs and storage."""

    address: str | None = None
    """Ray cluster to join: `HOST:PORT` of its head node, `auto` for the one that this machine is
    part of, or `local` for a Ray of this command alone (default: `RAY_ADDRESS`, else `local`)."""
    env: tuple[str, ...] = ("NCCL_*", "GLOO_*", "HF_TOKEN", "AWS_*")
    """Environment variables that the processes of a cluster get from the command: names, patterns
    such as `AWS_*`, or `NAME=value`. Give keys and tokens by name only, because settings are stored
    with every run."""
    num_workers: StrictInt = Field(default=1, gt=0)
    """Data-parallel workers of a training job; with GPUs, one each."""
    num_gpus: StrictInt = Field(default=0, ge=0)
    """GPUs of a training job; 0 trains on CPUs."""
    gpu: GpuModel | None = None
    """Model of GPU for which a dry run computes hours and memory (default: the installed one, else
    an H100). Trainings do not read it."""
    device: str | None = None
    """Device of commands that only measure: `cpu`, `cuda`, or `cuda:1` for the second GPU (default:
    a GPU of the cluster or of this machine, if there is one)."""
    min_gpus: StrictInt | None = Field(default=None, gt=0)
    """Fewest GPUs of a training job: it goes on with these when nodes are lost, and takes up to
    `num_gpus` when nodes join (default: always `num_gpus`)."""
    storage: str | None = None
    """URI for uploads of pretraining checkpoints, such as `s3://bucket/runs`. They are downloaded
    from there if the workspace has none."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: each worker holds a replica of the model; `fsdp`: each holds a shard of its weights,
    gradients and moments, which takes less memory and more traffic."""
    num_shards: StrictInt | None = Field(default=None, gt=1)
    """With `fsdp`, workers that share one replica of the model (default: all). A divisor of the
    workers makes several replicas (HSDP), such as one per node: only gradients are exchanged
    between them."""
    max_failures: StrictInt = Field(default=2, ge=0)
    """Most restarts of a training job from its newest checkpoint after a worker died. Each new
    checkpoint resets the count."""
    collective_timeout_seconds: StrictInt = Field(default=600, gt=0)
    """Longest wait of a worker for the others in a step, before the job restarts from its newest
    checkpoint. Saving, uploads and downloads may take longer."""
    node_wait_minutes: StrictFloat | None = Field(default=None, ge=0)
    """Longest wait of a running job for nodes that replace lost ones (default: no limit)."""

    @property
    def ray_address(self) -> str:
        """The address in force: the setting, else `RAY_ADDRESS`, else `local`.

        Raises:
            UserError: If `RAY_ADDRESS` is not an address of a cluster.
        """
        if self.address is not None:
            return self.address
        address = os.environ.get(ADDRESS_VARIABLE) or LOCAL
        if problem := address_problem(address):
            raise UserError(f"{ADDRESS_VARIABLE}: {problem}; got {quoted(address)}")
        return address

    def shards_of(self, num_workers: int) -> int | None:
        """Workers of a trial that share one replica of its model; None for all.

        A trial may have fewer workers than a training job, among which `num_shards` are too many.
        """
        shards = self.num_shards
        return shards if shards and num_workers % shards == 0 else None

    @property
    def fewest_gpus(self) -> int:
        """GPUs with which a training job can start."""
        return self.min_gpus or self.num_gpus

    @field_validator("address", "device", "storage")
    @classmethod
    def _refuse_other_texts(cls, text: str | None, info: ValidationInfo) -> str | None:
        checks = {"address": address_problem, "device": device_problem, "storage": storage_problem}
        if text is not None and (problem := checks[str(info.field_name)](text)):
            raise ValueError(problem)
        return text

    @field_validator("env")
    @classmethod
    def _refuse_other_variables(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            name, _, value = entry.partition("=")
            if not _VARIABLE.fullmatch(entry):
                raise ValueError(
                    "an entry is the name of a variable, a pattern such as AWS_*, or NAME=value"
                )
            if value and (is_secret_name(name) or has_secret(value)):
                raise ValueError(
                    f"the value of {name} is a secret, and settings are stored with every run; "
                    "give only its name, and set it in the environment of the command"
                )
        return entries


def address_problem(address: str) -> str | None:
    """Return why an address of Ray cannot be joined, or None."""
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", address, flags=re.ASCII)
    if address in (LOCAL, AUTO) or (match and 0 < int(match[1]) < 2**16):
        return None
    return (
        f"an address is HOST:PORT of a cluster's head node (usually port 6379), {AUTO} or {LOCAL}; "
        "Ray Client's ray:// is not made for Ray Train and Ray Tune"
    )


def device_problem(device: str) -> str | None:
    """Return why this is no name of a device, or None."""
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        return None
    return "a device is cpu, cuda, or cuda:N for one of several GPUs"


def storage_problem(uri: str) -> str | None:
    """Return why a storage address is refused (it holds a secret), or None."""
    if not has_secret(uri):
        return None
    return (
        "the address holds a password or a key, and settings are stored with every run; leave it "
        "out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment (for GCS "
        "GOOGLE_APPLICATION_CREDENTIALS)"
    )
