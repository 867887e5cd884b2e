"""A command reaches the optimizer's step through few calls, and a debugger shows each of them.

`iiet-orch sweep-iterations`; functions of this repository only.
"""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from commands import settings_options, wait_until
from pretended_ray import idle_ray, run_trials_here
from small_size import SMALL

import orchestrator
from orchestrator import cli

ROOT = str(Path(orchestrator.__file__).parent.parent)
DEPTH = (
    "data.source=depth data.depth.tasks=[phop_2] data.depth.num_symbols=2 data.depth.length=8 "
    "model.context_length=8"
)


def repository_calls(frame: FrameType | None) -> list[str]:
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
    paths: list[list[str]] = []

    def calls_of_the_driver() -> list[str]:
        """Return what the main thread is in until it waits; empty if it does not wait yet."""
        calls = repository_calls(sys._current_frames()[threading.main_thread().ident])
        waiting = "terminal/stop.wait_for_work"
        return calls[: calls.index(waiting)] if waiting in calls else []

    def step(*_: Any, **__: Any) -> None:
        wait_until(calls_of_the_driver)
        paths.append(calls_of_the_driver())
        paths.append(repository_calls(sys._getframe(1)))
        raise KeyboardInterrupt

    idle_ray(monkeypatch)
    run_trials_here(monkeypatch)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = ["-r", "1", "--methods", "iiet"]
    assert cli.main(arguments("sweep-iterations", tmp_path / "workspace", *options)) == 130
    driver, inside = paths
    worker = inside[inside.index("cluster/tune.run_in_tune") :]
    assert (driver[0], worker[-1]) == ("cli/app.main", "training/trainer.train")
    assert len({call.split(".")[0] for call in [*driver, *worker]}) <= 8, "files"
    assert len(driver) + len(worker) <= 12
