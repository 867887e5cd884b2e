"""The overhead of a sweep.

Overhead: a whole sweep under Ray Tune, one trial at a time, with its locks, its front over time and
MLflow's records in a local database, is compared with the same trainings and evaluations in a plain
loop of this process with as many threads. The first trial and Ray's start are one-time costs and do
not count. Trials are compared one by one; a second row shows the overhead for trials of a minute.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.report import RATIO, Goal, Row, checked
from benchmarks.runner import Setup
from benchmarks.shape import shaped_config
from benchmarks.timing import Spread
from iiet.iiad.pruning import InfluenceTable
from orchestrator.cluster.ray import ray_cluster
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import DataSettings, resolve_settings
from orchestrator.sweeping.run import run_trials
from orchestrator.sweeping.students import Students
from orchestrator.sweeping.suite import load_tasks, plan_suite
from orchestrator.sweeping.trial import measure_trial
from orchestrator.sweeping.trials import trials_of_students
from orchestrator.terminal.progress import Progress
from orchestrator.tracking.tracker import open_tracking
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import DONE_NAME, open_workspace

_MINUTE = 60.0
_CONTEXT = 64
_VOCABULARY = 1024
_NUM_DOCUMENTS = 400


def sweep(setup: Setup) -> Iterator[Row]:
    """Train the same students under Ray Tune and in a loop."""
    dim, num_layers = (16, 2) if setup.is_toy else (128, 6)
    num_steps, num_trials, num_items = (6, 3, 20) if setup.is_toy else (50, 5, 60)
    yield Row(
        what=f"IIET, d {dim}, {num_layers} layers, r = 2, {num_trials} trials of {num_steps} steps,"
        " one at a time; the first and Ray's start not counted"
    )
    tokens = setup.tokens(DataSettings(vocab_size=_VOCABULARY, max_documents=_NUM_DOCUMENTS))
    config = shaped_config(dim, num_layers, _VOCABULARY, _CONTEXT, schedule=2)
    recipe = {"num_tokens_per_step": 8 * _CONTEXT, "num_validation_tokens": _CONTEXT}
    settings = resolve_settings(
        {
            "training": {**recipe, "num_steps": 1},
            "distillation": {"training": {**recipe, "num_steps": num_steps}},
            "evaluation": {"num_items": num_items},
            "sweep": {"num_schedules": num_trials, "trials_at_once": 1},
        }
    )
    teacher = run_job(
        TrainingJob(
            run_folder=str(setup.folder / "teacher"),
            tokens_folder=str(tokens),
            model=config,
            recipe=settings.training,
        )
    )
    draw = random.Random(0)
    influence = InfluenceTable(
        metric="cosine",
        value_rows=tuple((draw.random(), draw.random() / 4) for _ in range(num_layers)),
        error_rows=((0.0, 0.0),) * num_layers,
        num_tokens=_CONTEXT,
    )
    asked = settings.evaluation, tokens, config
    suite = plan_suite(*asked, load_tasks(*asked, Progress()))
    here, there = (open_workspace(setup.folder / name) for name in ("swept", "looped"))
    plans = [
        trials_of_students(
            Students(
                settings.sweep,
                settings.distillation,
                space,
                Path(str(teacher.checkpoint)),
                suite,
                influence,
            )
        )
        for space in (here, there)
    ]
    swept, looped = ([trial for trial in plan.trials if trial.job] for plan in plans)

    with ray_cluster(num_cpus=torch.get_num_threads()):
        run_trials(plans[0], settings, here, tracking=open_tracking(here))
    ends = sorted(trial.result_path.stat().st_mtime for trial in swept)
    loop_ends: list[float] = []
    for trial in looped:
        assert trial.job
        outcome = run_job(trial.job)
        trained = trial.model_copy(update={"checkpoint": outcome.checkpoint})
        measure_trial(trained, "cpu", Progress())
        loop_ends.append(time.time())

    pairs = zip(_losses(swept), _losses(looped), strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    yield checked("losses of a sweep's trials and a loop's", largest, 0.0)
    # From the end of the first trial on: the time before it is the start.
    each = {
        name: [b - a for a, b in pairwise(times)]
        for name, times in (("in the sweep", ends), ("in the loop", loop_ends))
    }
    yield Row.paired("a trial", each, "in the sweep", "in the loop")
    extra = [a - b for a, b in zip(*each.values(), strict=True)]
    yield Row(
        what="the same for trials of a minute (at most 3 s more)",
        figures={
            "added by the sweep (s)": Spread.of(extra),
            RATIO: Spread.of([(_MINUTE + seconds) / _MINUTE for seconds in extra]),
        },
        goal=None if setup.is_toy else Goal("at most", 1.05),
    )


def _losses(trials: Sequence[Trial]) -> list[float]:
    texts = [(Path(trial.folder) / DONE_NAME).read_text() for trial in trials]
    return [float(json.loads(text)["validation_loss"]) for text in texts]
