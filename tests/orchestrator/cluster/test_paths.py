"""A command reaches the optimizer's step through few calls, and a debugger shows each of them.

`iiet-orch sweep-iterations`; functions of this repository only.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from commands import settings_options
from small_size import SMALL

import orchestrator
from orchestrator import cli

ROOT = str(Path(orchestrator.__file__).parent.parent)
DEPTH = (
    "data.source=depth data.depth.tasks=[phop_2] data.depth.num_symbols=2 data.depth.length=8 "
    "model.context_length=8"
)


def repository_calls(frame: FrameType | None = None) -> list[str]:
    """Return the functions of this repository's packages on the stack, outermost first."""
    return [
        call.filename.removeprefix(f"{ROOT}/").removeprefix("orchestrator/")[:-3] + f".{call.name}"
        for call in traceback.extract_stack(frame)
        if call.filename.startswith((f"{ROOT}/orchestrator/", f"{ROOT}/iiet/"))
        if call.name != "<listcomp>"  # A frame until Python 3.11.
    ]


def arguments(command: str, workspace: Path, *options: str) -> list[str]:
    """Return a command that trains the smallest model for a step."""
    settings = [*SMALL, *DEPTH.split(), "training.num_steps=1"]
    sets = settings_options(settings, command)
    return [command, "--workspace", str(workspace), *options, *sets]


def test_the_path_of_a_sweep_is_short(tmp_path, monkeypatch):
    from orchestrator.cluster import ray, tune
    from orchestrator.sweeping import run

    stacks: list[list[str]] = []
    run_arguments: list[Any] = []
    run_trials = tune.run_trials
    resources = ray.local_resources(count_gpus=False)

    def noted(*arguments: Any, **named: Any) -> None:
        run_arguments.extend(arguments)
        run_trials(*arguments, **named)

    def wait_for_work(_: Any, **__: Any) -> None:
        stacks.append(repository_calls(sys._getframe(1)))
        function = run_arguments[0]
        trial = run_arguments[1].take()
        config = {"key": trial.key, "trial": trial.model_dump_json()}
        placement = tune.job_placement(1, 1, 0, resources)
        stop = SimpleNamespace(is_sent=lambda: False)
        tune.run_in_tune(
            config,
            function=function,
            placement=placement,
            cluster=tune.ClusterSettings(),
            stop=stop,  # type: ignore[arg-type]
            stops=None,
        )

    def step(*_: Any, **__: Any) -> None:
        stacks.append(repository_calls(sys._getframe(1)))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run_trials", noted)
    for module in (tune, run):
        monkeypatch.setattr(module, "ray_cluster", lambda *_, **__: nullcontext(resources))
    monkeypatch.setattr(tune, "start_thread", lambda _: None)
    monkeypatch.setattr(tune, "wait_for_work", wait_for_work)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = ["-r", "1", "--methods", "iiet"]
    assert cli.main(arguments("sweep-iterations", tmp_path / "workspace", *options)) == 130
    driver, inside = stacks
    worker = inside[inside.index("cluster/tune.run_in_tune") :]
    assert (driver[0], worker[-1]) == ("cli/app.main", "training/trainer.train")
    assert len({call.split(".")[0] for call in [*driver, *worker]}) <= 8, "files"
    assert len(driver) + len(worker) <= 11
