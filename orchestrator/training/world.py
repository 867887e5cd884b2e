"""A worker: its rank and device; and the peak FLOP/s of GPUs.

PyTorch is not imported, so that plans can use this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.workspace.processors import processor_name


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and device of one worker. A process group exists if `size` > 1."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: str = "cpu"
    """This worker's device, such as `cpu` or `cuda:0`."""
    parallel: str = "ddp"
    """`ddp`: each worker has the whole model; `fsdp`: each worker has a shard of it."""
    shards: int | None = None
    """With `fsdp`, workers that hold one model together, if not all; it divides `size`."""

    @property
    def is_first(self) -> bool:
        """Whether this worker writes the files and makes the decisions."""
        return self.rank == 0

    @property
    def is_gpu(self) -> bool:
        """Whether this worker's device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def processor(self) -> str:
        """Name of this worker's GPU or CPU."""
        if not self.is_gpu:
            return processor_name()
        import torch

        return torch.cuda.get_device_name(self.device)

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded over the workers."""
        return self.size > 1 and self.parallel == "fsdp"

    @property
    def num_shards(self) -> int:
        """Number of workers that hold one model together; 1 if each has the whole model."""
        return self.shards or self.size if self.is_sharded else 1


# GPUs

_PEAK_TFLOPS = {
    # By full name, without vendor, brand and memory size. GPUs of one family differ by a third
    # (H100 as module and as PCIe card), and laptop or partitioned GPUs differ more.
    # (bfloat16, TF32): the vendors' figures for dense matrices; tensor cores compute float32
    # products as TF32.
    "GB200": (2500.0, 1250.0),
    "B200": (2250.0, 1100.0),
    "H200": (989.0, 494.0),
    "H100": (989.0, 494.0),
    "H100 HBM3": (989.0, 494.0),
    "H100 PCIE": (756.0, 378.0),
    "A100 SXM4": (312.0, 156.0),
    "A100 PCIE": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "RTX 4090": (165.0, 82.6),
    "A40": (149.7, 74.8),
    "A10": (125.0, 62.5),
    "L4": (121.0, 60.0),
    # Older GPUs have neither format; their products stay float32.
    "V100 SXM2": (None, 15.7),
    "T4": (None, 8.1),
}
_NOT_IN_THE_NAME = re.compile(r"NVIDIA|GEFORCE|TESLA|\d+GB")


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU such as `NVIDIA H100 80GB HBM3`; None if it is unknown."""
    words = re.split(r"[\s-]+", name.upper())
    model = " ".join(word for word in words if not _NOT_IN_THE_NAME.fullmatch(word))
    bf16, fp32 = _PEAK_TFLOPS.get(model, (None, None))
    peak = bf16 if precision == "bf16" else fp32
    return peak * 1e12 if peak else None
