"""One worker of a benchmark's run: `python -m benchmarks.training_worker RANK SIZE`, the job on
standard input.

Several meet through a file and average their gradients with gloo, as under Ray Train, which would
take longer to start than the benchmark takes.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from orchestrator.training.distributed import World
from orchestrator.training.job import TrainingJob
from orchestrator.training.run import run_job


def main(rank: int, size: int) -> None:
    """Run this worker's part of the job.

    Args:
        rank: this worker, from 0.
        size: workers.
    """
    torch.set_num_threads(1)
    request = json.loads(sys.stdin.read())
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{request['meeting']}.meeting", rank=rank, world_size=size
        )
    run_job(TrainingJob.from_dict(request["job"]), world=World(rank=rank, size=size))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
