"""One worker of a benchmark's run: `python -m benchmarks.training_worker RANK SIZE`, the job on
standard input.

Workers connect through a file and average their gradients with gloo, as under Ray Train, whose
start would take longer than the benchmark.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from orchestrator.records.training import TrainingJob
from orchestrator.training.distributed import World
from orchestrator.training.run import run_job


def main(rank: int, size: int) -> None:
    """Run the part of worker `rank` (from 0) of `size` workers."""
    torch.set_num_threads(1)
    request = json.loads(sys.stdin.read())
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{request['meeting']}.meeting", rank=rank, world_size=size
        )
    run_job(TrainingJob.model_validate(request["job"]), world=World(rank=rank, size=size))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
