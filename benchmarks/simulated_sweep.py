"""A workspace with the results of many trials that no one has trained."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.shape import shaped_config
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.data.preparation import prepare
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.pipelines.sweeps import load_tasks, plan_suite
from orchestrator.records.evaluation import EvaluationKeys, TaskResult
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialTraining
from orchestrator.settings import DataSettings, Settings, resolve_settings
from orchestrator.sweeping.student_plans import threshold_plan
from orchestrator.terminal.progress import Progress
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import JOURNAL_NAME
from orchestrator.workspace.layout import open_workspace

NUM_LAYERS, MOST_CORRECTIONS = 12, 3
NUM_STEPS = 60
"""Steps of a trial; its journal has a record for each."""
NUM_ITEMS = 700
"""Items of each task, the default number."""
TASKS = ("cloze", "last_word")
CONTEXT, VOCABULARY = 64, 512


class SimulatedSweep:
    """A teacher that was trained for one step, and a plan with random schedules of it."""

    def __init__(self, num_trials: int, folder: Path) -> None:
        self.workspace = open_workspace(folder / "workspace")
        self._num_trials = num_trials
        data = DataSettings(vocab_size=VOCABULARY, max_documents=200)
        self._tokens = prepare(data, self.workspace, Progress())
        self._config = shaped_config(
            16,
            num_layers=NUM_LAYERS,
            vocab_size=VOCABULARY,
            context_length=CONTEXT,
            num_corrections=MOST_CORRECTIONS,
        )
        job = TrainingJob(
            run_folder=str(self.workspace.runs / "teacher"),
            tokens_folder=str(self._tokens),
            model=self._config,
            recipe=self.settings.training,
        )
        self._teacher = Path(str(run_job(job).checkpoint))

    @property
    def settings(self) -> Settings:
        """The settings of the sweep."""
        recipe = {"num_tokens_per_step": 8 * CONTEXT, "num_validation_tokens": CONTEXT}
        student = {"training": {**recipe, "num_steps": NUM_STEPS}, "teacher_cache": "live"}
        return resolve_settings({"training": {**recipe, "num_steps": 1}, "distillation": student})

    def plan(self) -> SweepPlan:
        """Return the plan: the teacher and its students."""
        draw, no_threshold = random.Random(0), float("nan")
        schedules: dict[IterationSchedule, None] = {}
        while len(schedules) < self._num_trials:
            corrections = (draw.randint(0, MOST_CORRECTIONS) for _ in range(NUM_LAYERS))
            schedules[IterationSchedule(tuple(corrections))] = None
        asked = self.settings.evaluation, self._tokens, self._config
        return threshold_plan(
            self.settings,
            self.workspace,
            teacher=self._teacher,
            members=[FamilyMember(schedule, no_threshold, no_threshold) for schedule in schedules],
            suite=plan_suite(*asked, load_tasks(*asked, Progress())),
        )

    def finish(self, trials: Iterable[Trial]) -> None:
        """Write result, values of items and journal of trials; more evaluations are better."""
        draw, store = random.Random(1), EvaluationStore(self.workspace.evaluations)
        items = [f"{number:032x}" for number in range(NUM_ITEMS)]
        for trial in trials:
            share = trial.model.corrections.num_evaluations / (NUM_LAYERS * (1 + MOST_CORRECTIONS))
            accuracy = 0.4 + 0.3 * share + 0.05 * draw.random()
            keys = {task: f"{trial.key}-{task}" for task in TASKS}
            for task, key in keys.items():
                values = [float(draw.random() < accuracy) for _ in items]
                store.write(key, _task_result(task, items, values))
            measured = {
                "quality": {"accuracy": accuracy, "accuracy_stderr": 0.013, "validation_loss": 3.0},
                "evaluation": EvaluationKeys(tasks=keys),
                "checkpoint": f"{trial.folder}/step_{NUM_STEPS:08d}",
                "train": TrialTraining(steps=NUM_STEPS, tokens=30_720, flops=1e12, seconds=10.0),
            }
            trial.model_copy(update=measured).write(trial.result_path)
            write_journal(trial, NUM_STEPS)


def write_journal(trial: Trial, num_steps: int) -> None:
    """Write the journal of a trial's training up to a step."""
    path = Path(trial.folder) / JOURNAL_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"train/loss": 4.0, "train/kl": 0.1, "train/learning_rate": 1e-3}
    records = [
        {"time": 0, "kind": "metrics", "step": step, "values": values}
        for step in range(1, num_steps + 1)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _task_result(task: str, items: list[str], values: Sequence[float]) -> TaskResult:
    return TaskResult(
        name=task,
        version="1",
        num_items=len(items),
        metrics={"acc": sum(values) / len(values), "acc_stderr": 0.018},
        items=items,
        values={"acc": list(values)},
        log_likelihoods=[[-1.25, -2.5, -3.5, -4.5]] * len(items),
    )
