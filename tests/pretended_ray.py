"""Stands for Ray: what it would do on its nodes happens in this process, or as a test says.

What is ours is the real thing: it starts Ray, places jobs, starts them and hears how they ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from orchestrator.planning.machine import Node
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.terminal.progress import Progress


def idle_ray(
    monkeypatch: pytest.MonkeyPatch,
    *nodes: Node,
    wait: Callable[[float], bool] = lambda _: True,
) -> None:
    """Let Ray start at once; its actors do nothing.

    Args:
        nodes: What it has: one CPU, if none is named.
        wait: Waits so many seconds for a place, and returns whether it was found.
    """
    import ray

    # `ray.util` has a function of this name, which hides the module.
    placement_group = import_module("ray.util.placement_group")
    resources = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes or (Node(1),)]
    alive_nodes = [{"Alive": True, "Resources": values} for values in resources]
    group = SimpleNamespace(wait=wait)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: alive_nodes)
    monkeypatch.setattr(ray, "remote", lambda *_, **__: lambda _: MagicMock())
    monkeypatch.setattr(placement_group, "placement_group", lambda *_: group)
    monkeypatch.setattr(placement_group, "remove_placement_group", lambda _: None)


def train_here(monkeypatch: pytest.MonkeyPatch, train: Callable[[TrainingJob], object]) -> None:
    """Let an attempt of Ray Train be a call of a function; what that raises, Ray raises."""
    import ray.train.torch

    class Trainer:
        def __init__(self, _: Any, *, train_loop_config: dict[str, Any], **__: Any) -> None:
            self.job = TrainingJob.model_validate(train_loop_config["job"])

        def fit(self) -> None:
            train(self.job)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)


def begin_workers_with(monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], None]) -> None:
    """Let each worker of a real Ray Train call a function first.

    The function travels to the workers, which cannot import tests: a test defines it in itself.
    """
    import ray.train.torch

    class Trainer(ray.train.torch.TorchTrainer):
        def __init__(self, work: Callable[[Any], None], **options: Any) -> None:
            def prepare_and_work(config: Any) -> None:
                prepare()
                work(config)

            super().__init__(prepare_and_work, **options)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)


def run_tasks_here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let a task of Ray that needs a GPU be done by the CPU of this process. One that raises an
    error of Ray dies.

    Returns the options of each attempt, which grows.
    """
    import ray

    attempts: list[dict[str, Any]] = []

    def remote(**options: Any) -> Any:
        def start(work: Any) -> Iterator[Any]:
            attempts.append(options)
            yield (work("cpu", Progress()),)

        return lambda _: SimpleNamespace(remote=start)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "wait", lambda events, **_: (events, []))
    monkeypatch.setattr(ray, "get", lambda event: event)
    return attempts


def run_trials_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray Tune run one trial after the other in this process."""
    import ray.tune

    reports: list[dict[str, Any]] = []

    def run(function: Callable[[Any], None], config: dict[str, Any]) -> dict[str, Any]:
        function(config)
        return reports[-1]

    monkeypatch.setattr(ray.tune, "report", reports.append)
    replace_tuner(monkeypatch, run)


def end_trials_here(monkeypatch: pytest.MonkeyPatch, end: Callable[[Trial], Trial | str]) -> None:
    """Let Ray Tune end one trial after the other with what a function returns: the trial's result,
    or why it failed."""

    def run(_: Any, config: dict[str, Any]) -> dict[str, Any]:
        outcome = end(Trial.model_validate_json(config["trial"]))
        if isinstance(outcome, str):
            answer = [None, outcome]
        else:
            answer = [outcome.model_dump(mode="json"), ""]
        return {"answer": json.dumps(answer)}

    replace_tuner(monkeypatch, run)


def replace_tuner(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Callable[[Any], None], dict[str, Any]], dict[str, Any]],
) -> None:
    """Let Ray Tune run one trial after the other.

    Args:
        run: Gets the function that Tune would run and a trial's config, and returns what the trial
            reports last.
    """
    import ray.tune

    class Tuner:
        def __init__(self, function: Any, *, tune_config: Any, run_config: Any) -> None:
            self.function = function
            self.suggest = tune_config.search_alg.suggest
            [self.listener] = run_config.callbacks

        def fit(self) -> None:
            while isinstance(config := self.suggest(""), dict):
                self.listener.on_trial_start(trial=SimpleNamespace(config=config))
                answer = run(self.function, config)
                ended = SimpleNamespace(config=config, last_result=answer)
                self.listener.on_trial_complete(trial=ended)

    monkeypatch.setattr(ray.tune, "Tuner", Tuner)
