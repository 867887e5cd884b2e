"""Peak memory of one training step, measured in a process that does nothing else.

Resident memory is read, because it is what the machine must have; it includes the kernels'
workspace, which a sum of tensor sizes does not. A process's peak never falls, and its allocator
depends on what ran before. So each measurement has a fresh process with the same settings of the C
library's allocator: free large blocks return to the system at once, and the peak is that of live
memory, without fragments. Weights, gradients and libraries exist before the step and are not
counted. On Linux the peak comes from /proc, because `getrusage` starts at the parent's peak.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.mix_variants import StepSize, Variant, build, step, written_as

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Settings of glibc's allocator, the same for all variants; elsewhere they do nothing."""

_WARM_UP_TOKENS = 8
_ROOT = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")


def peak_bytes(size: StepSize, variant: Variant) -> int:
    """Return the bytes by which a step raises the resident memory of a fresh process.

    Raises:
        RuntimeError: the process failed; the message holds the end of its error output.
    """
    request = json.dumps(
        {"size": asdict(size), "variant": variant, "threads": torch.get_num_threads()}
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mix_memory", request],
        env={**os.environ, **ALLOCATOR},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed: {done.stderr[-2000:]}")
    return int(done.stdout)


def measure_here(size: StepSize, variant: Variant) -> int:
    """Run one step in this process and return the bytes by which it raised the resident memory."""
    decoder, input_ids = build(size)
    with written_as(variant, decoder):
        step(decoder, input_ids[:1, :_WARM_UP_TOKENS])  # Makes the gradients.
        before = _resident_bytes(peak=False)
        step(decoder, input_ids)
    return _resident_bytes(peak=True) - before


def _resident_bytes(*, peak: bool) -> int:
    if not _STATUS.exists():
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    key = "VmHWM:" if peak else "VmRSS:"
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _main(request: str) -> None:
    values = json.loads(request)
    torch.set_num_threads(values["threads"])
    print(measure_here(StepSize(**values["size"]), values["variant"]))


if __name__ == "__main__":
    _main(sys.argv[1])
