"""A command reaches the optimizer's step through few calls, and a debugger shows each of them.

The path of `iiet-orch pretrain --workers 2`, functions of this repository only:

1. `cli.app.main`: parses the command line
2. `cli.command.run`: reads the settings, opens the workspace, prints the result
3. `cli.train.pretrain`: the command
4. `pipelines.training.run_pretrain`: makes what the plan lacks
5. `pipelines.training.run_trainings`: follows the jobs
6. `cluster.train.run_train_jobs`: starts Ray
7. `cluster.train._run_together`: starts a thread for each job
8. `cluster.train.fit_job`: starts the workers of a job
9. `cluster.train._train_worker`: in a worker, called by Ray
10. `training.trainer.run_job`: resumes and saves
11. `training.trainer.train`: the loop, which calls `optimizer.step`
"""

from __future__ import annotations

import concurrent.futures
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator import cli

ROOT = str(Path(orchestrator.__file__).parent.parent)

COMMAND = ["cli/app.main", "cli/command.run", "cli/train.pretrain"]
PIPELINE = ["pipelines/training.run_pretrain", "pipelines/training.run_trainings"]
IN_DRIVER = [*COMMAND, *PIPELINE, "cluster/train.run_train_jobs", "cluster/train._run_together"]
IN_WORKER = ["cluster/train._train_worker", "training/trainer.run_job", "training/trainer.train"]


def own_calls(frame: FrameType | None = None) -> list[str]:
    """Return the functions of this repository's packages on the stack, outermost first."""
    return [
        call.filename.removeprefix(f"{ROOT}/").removeprefix("orchestrator/")[:-3] + f".{call.name}"
        for call in traceback.extract_stack(frame)
        if call.filename.startswith((f"{ROOT}/orchestrator/", f"{ROOT}/iiet/"))
        if call.name != "<listcomp>"  # A frame until Python 3.11.
    ]


def arguments(workspace: Path, *options: str) -> list[str]:
    """Return a command that pretrains the smallest model for a step."""
    text = workspace.parent / "text.txt"
    text.write_text("\n\n".join(f"The {n}th sentence has {n} words." for n in range(500)))
    settings = (
        f"data.source=files data.files=[{text}] data.vocab_size=300 model.num_layers=1 "
        "model.dim=16 model.num_heads=1 model.ffn_dim=16 model.context_length=16 "
        "model.corrections=1 training.num_steps=1 training.num_tokens_per_step=64 "
        "training.num_validation_tokens=64"
    )
    sets = [word for setting in settings.split() for word in ("--set", setting)]
    return ["pretrain", "--workspace", str(workspace), *options, *sets]


def test_the_path_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, closure: Any = None) -> Any:
        stacks.append(own_calls(sys._getframe(1)))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    assert cli.main(arguments(tmp_path / "workspace", "--local")) == 0
    (stack,) = stacks
    assert stack == [*COMMAND, *PIPELINE, "cluster/task.run_local_jobs", *IN_WORKER[1:]]


@pytest.mark.slow
def test_the_path_with_two_workers_has_eleven_calls(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train.torch

    from orchestrator.cluster import train

    in_driver: list[list[str]] = []
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def recorded_submit(self: Any, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if function is train.fit_job:
            in_driver.append(own_calls(sys._getframe(1)))
        return submit(self, function, *given, **named)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", recorded_submit)
    in_thread: list[list[str]] = []
    trainer: Any = ray.train.torch.TorchTrainer
    fit = trainer.fit

    def recorded_fit(self: Any) -> Any:
        in_thread.append(own_calls(sys._getframe(1)))
        return fit(self)

    monkeypatch.setattr(trainer, "fit", recorded_fit)
    monkeypatch.setattr(
        train, "_train_worker", recording(train._train_worker, tmp_path / "stack", ROOT)
    )
    assert cli.main(arguments(tmp_path / "workspace", "--workers", "2")) == 0
    assert in_driver == [IN_DRIVER]
    assert in_thread == [["cluster/train.fit_job"]]
    in_worker = (tmp_path / "stack").read_text().splitlines()
    assert in_worker == IN_WORKER
    assert len(in_driver[0]) + len(in_thread[0]) + len(in_worker) == 11


def recording(
    train_worker: Callable[[dict[str, Any]], dict[str, Any]], path: Path, root: str
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a worker function that writes the stack of the first worker's step into a file."""

    def worker(config: dict[str, Any]) -> dict[str, Any]:
        import traceback

        import torch

        step = torch.optim.AdamW.step

        def recorded(self: torch.optim.AdamW, closure: Any = None) -> Any:
            lines = [
                call.filename.removeprefix(f"{root}/orchestrator/")[:-3] + f".{call.name}\n"
                for call in traceback.extract_stack()[:-1]
                if call.filename.startswith((f"{root}/orchestrator/", f"{root}/iiet/"))
            ]
            if torch.distributed.get_rank() == 0:
                path.write_text("".join(lines))
            return step(self, closure)

        torch.optim.AdamW.step = recorded  # type: ignore[method-assign]
        try:
            return train_worker(config)
        finally:
            torch.optim.AdamW.step = step  # type: ignore[method-assign]

    return worker
