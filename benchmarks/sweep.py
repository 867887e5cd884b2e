"""The overhead of a sweep.

Overhead: a whole sweep under Ray Tune, one trial at a time, with its locks, its front over time and
MLflow's records in a local database, is compared with the same trainings and evaluations in a plain
loop of this process with as many threads. The first trial and Ray's start are one-time costs and do
not count. Trials are compared one by one; a second row shows the overhead for trials of a minute.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import shaped_config
from benchmarks.timing import Spread, paired_ratio
from iiet.influence import InfluenceTable
from orchestrator.cluster.ray import ray_cluster
from orchestrator.data.preparation import prepare
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import DataSettings, Settings, resolve_settings
from orchestrator.sweeping.plan import load_tasks, plan_suite, students_plan
from orchestrator.sweeping.run import run_plan
from orchestrator.sweeping.students import Students
from orchestrator.sweeping.trial import measure_trial
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import open_tracking
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import DONE_NAME, Workspace, open_workspace

_MINUTE = 60.0
_CONTEXT = 64
_VOCABULARY = 1024
_NUM_DOCUMENTS = 400


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure a sweep's overhead."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), quick=quick)
        say(f"sweep: {bench.num_trials} trials, under Ray Tune and in a loop")
        overhead, check = bench.overhead(Goal("at most", 1.05) if not quick else None)
    setting = (
        f"IIET, d {bench.config.dim}, {bench.config.num_layers} layers, r = 2, trials of "
        f"{bench.num_steps} steps, one at a time; the first and Ray's start not counted"
    )
    return Report(title="sweep", setting=setting, rows=overhead, checks=[check])


class _Bench:
    """A teacher, a made-up influence table, and the plans made from them."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        dim, num_layers = (16, 2) if quick else (128, 6)
        self.num_steps, self.num_trials, self.num_items = (6, 3, 20) if quick else (50, 5, 60)
        self.folder = folder
        data = DataSettings(vocab_size=_VOCABULARY, max_documents=_NUM_DOCUMENTS)
        self.tokens = prepare(data, open_workspace(folder / "prepared"), Progress())
        self.config = shaped_config(dim, num_layers, _VOCABULARY, _CONTEXT, schedule=2)
        draw = random.Random(0)
        self.influence = InfluenceTable(
            metric="cosine",
            value_rows=tuple((draw.random(), draw.random() / 4) for _ in range(num_layers)),
            error_rows=((0.0, 0.0),) * num_layers,
            num_tokens=_CONTEXT,
        )
        job = TrainingJob(
            run_folder=str(folder / "teacher"),
            tokens_folder=str(self.tokens),
            model=self.config,
            recipe=self.settings().training,
        )
        self.teacher = Path(str(run_job(job).checkpoint))

    def settings(self, **sweep: Any) -> Settings:
        """Return settings of the bench's size."""
        recipe = {"num_tokens_per_step": 8 * _CONTEXT, "num_validation_tokens": _CONTEXT}
        longer = {**recipe, "num_steps": self.num_steps}
        return resolve_settings(
            {
                "training": {**recipe, "num_steps": 1},
                "distillation": {"training": longer},
                "evaluation": {"num_items": self.num_items},
                "sweep": sweep,
            }
        )

    def plan(self, workspace: Workspace, **sweep: Any) -> SweepPlan:
        """Return the plan of a threshold sweep."""
        settings = self.settings(**sweep)
        asked = settings.evaluation, self.tokens, self.config
        suite = plan_suite(*asked, load_tasks(*asked, Progress()))
        return students_plan(Students(settings, workspace, self.teacher, suite), self.influence)

    def overhead(self, goal: Goal | None) -> tuple[list[Row], str]:
        """Train the same students under Ray Tune and in a loop."""
        asked = {"num_schedules": self.num_trials, "trials_at_once": 1}
        here, there = (open_workspace(self.folder / name) for name in ("swept", "looped"))
        swept, looped = (
            [trial for trial in self.plan(space, **asked).trials if trial.job]
            for space in (here, there)
        )
        tracking = open_tracking(here)
        with ray_cluster(num_cpus=torch.get_num_threads()):
            run_plan(self.plan(here, **asked), self.settings(**asked), here, tracking=tracking)
        ends = sorted(trial.result_path.stat().st_mtime for trial in swept)
        loop_ends: list[float] = []
        for trial in looped:
            assert trial.job
            outcome = run_job(trial.job)
            measure_trial(trial.model_copy(update={"checkpoint": outcome.checkpoint}), "cpu")
            loop_ends.append(time.time())
        pairs = zip(_losses(swept), _losses(looped), strict=True)
        largest = max(abs(a - b) for a, b in pairs)
        check = checked("losses of a sweep's trials and a loop's", largest, 0.0)
        # From the end of the first trial on: the time before it is the start.
        swept_each, looped_each = ([b - a for a, b in pairwise(t)] for t in (ends, loop_ends))
        extra = [a - b for a, b in zip(swept_each, looped_each, strict=True)]
        sweep = Quantity("sweep", Spread.of(swept_each), "s")
        rows = [
            Row(
                what="a trial in a sweep / in a loop",
                quantities=(sweep, Quantity("loop", Spread.of(looped_each), "s")),
                ratio=paired_ratio(swept_each, looped_each),
            ),
            Row(
                what="the same for trials of a minute (at most 3 s more)",
                quantities=(Quantity("added by the sweep", Spread.of(extra), "s"),),
                ratio=Spread.of([(_MINUTE + seconds) / _MINUTE for seconds in extra]),
                goal=goal,
            ),
        ]
        return rows, check


def _losses(trials: Sequence[Trial]) -> list[float]:
    texts = [(Path(trial.folder) / DONE_NAME).read_text() for trial in trials]
    return [float(json.loads(text)["validation_loss"]) for text in texts]
