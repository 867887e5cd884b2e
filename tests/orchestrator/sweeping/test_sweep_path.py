"""A sweep reaches the optimizer's step through few calls, and a debugger shows each of them.

The path of `iiet-orch sweep-iterations` stands in docs/architecture.md, functions of this
repository only; this walks it.
"""

from __future__ import annotations

import re
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from small_size import SMALL

import orchestrator
from orchestrator import cli
from orchestrator.cluster import ray, tune
from orchestrator.sweeping import run

ROOT = str(Path(orchestrator.__file__).parent.parent)
PAGE = Path(orchestrator.__file__).parent.parent / "docs" / "architecture.md"


def documented_path() -> list[str]:
    """Return the functions of the page's table, as `own_calls` names them."""
    section = PAGE.read_text("utf-8").partition("## A command: ")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([a-z_/]+)\.py` \| `([\w.]+)` \|", section, flags=re.MULTILINE)
    return [f"{file}.{name.split('.')[-1]}" for file, name in found]


def own_calls(frame: FrameType) -> list[str]:
    """Return the functions of this repository's packages on the stack, outermost first."""
    return [
        call.filename.removeprefix(f"{ROOT}/orchestrator/")[:-3] + f".{call.name}"
        for call in traceback.extract_stack(frame)
        if call.filename.startswith(f"{ROOT}/orchestrator/")
    ]


def test_the_path_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []

    def run_interruptibly(_: Any, **__: Any) -> None:
        stacks.append(own_calls(sys._getframe(1)))
        (queue,) = queues
        trial = queue.take()
        config = {"key": trial.key, "trial": trial.model_dump_json()}
        placement = tune.trial_placement(tune.SweepSettings(), 1, resources)
        place = tune.TrialPlace(placement, tune.ClusterSettings())
        tune._run_in_tune(config, function=functions[0], place=place, stop=None)  # type: ignore[arg-type]

    def step(*_: Any, **__: Any) -> None:
        stacks.append(own_calls(sys._getframe(1)))
        raise KeyboardInterrupt

    functions: list[Any] = []
    queues: list[Any] = []
    run_trials = tune.run_trials
    resources = ray.local_resources(count_gpus=False)

    def noted(function: Any, queue: Any, *given: Any, **named: Any) -> None:
        functions.append(function)
        queues.append(queue)
        run_trials(function, queue, *given, **named)

    monkeypatch.setattr(tune, "run_trials", noted)
    monkeypatch.setattr(tune, "ray_cluster", lambda *_, **__: nullcontext(resources))
    monkeypatch.setattr(run, "ray_cluster", lambda *_, **__: nullcontext(resources))
    monkeypatch.setattr(tune, "run_interruptibly", run_interruptibly)
    monkeypatch.setattr(tune, "looks_for", lambda _: lambda: False)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    depth = (
        "data.source=depth data.depth.tasks=[phop_2] data.depth.num_symbols=2 data.depth.length=8 "
        "model.context_length=8"
    )
    sets = [word for setting in [*SMALL, *depth.split()] for word in ("--set", setting)]
    options = ["-r", "1", "--methods", "iiet", "--workspace", str(tmp_path / "workspace")]
    assert cli.main(["sweep-iterations", *options, *sets]) == 130
    driver, inside = stacks
    worker = inside[inside.index("cluster/tune._run_in_tune") :]
    assert driver + worker[:4] == documented_path()
    assert worker[4:] == ["training/trainer.train"]
    assert len({call.split(".")[0] for call in driver + worker}) <= 8, "files"
    assert len(driver) + len(worker) <= 13
