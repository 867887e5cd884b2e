"""The controls of a retrofit: a teacher that starts from a source model.

Such a teacher may be better than its source model because of its corrections, or because it was
trained further. The control `source_continued` separates the two: the source model, fine-tuned
without corrections with as many training FLOPs as the teacher. Everything else is as for the
teacher: tokens and their order, the trained layers, the divergence from the source model. Two
learning rates are tried, each for as many tokens as the teacher reads; the control has the better
one. The better try is also the result at equal tokens.

Nothing is trained or written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from iiet.freezing import TrainedLayers
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.evaluation.heldout import LAST_WORD, offered_tasks
from orchestrator.evaluation.tasks import tasks_of_source
from orchestrator.models.folder import weights_key
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import StoredJob, TrainingJob
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED
from orchestrator.settings import (
    BASELINE_METHOD,
    SETTINGS_NAME,
    Settings,
    TrainingSettings,
    read_settings,
)
from orchestrator.settings.evaluation import DEFAULT_RETENTION, RETENTION_BITS, SHORT_ANSWERS
from orchestrator.terminal.render import format_count
from orchestrator.training.job import finished_outcome, has_diverged, in_usual_folder
from orchestrator.training.source import Source, find_source
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import JOB_NAME, Workspace, portable_path, step_of

SCRATCH = "scratch"
SCRATCH_WITH_SOURCE = "scratch_with_source"
EQUAL_TOKENS = f"{SOURCE_CONTINUED}, equal tokens"
"""Name of the source model, fine-tuned on as many tokens as the teacher."""
OTHER_RATE_FACTOR = 2.0
"""The second learning rate is this multiple of the teacher's, if the source model's own rate is
unknown: on text and on depth tasks, the best peak rate of a plain model was 1 to 2 times that of an
IIET of the same sizes."""


def source_settings(settings: Settings) -> Settings:
    """Return the settings of a source model that a sweep trains: a plain model of the teacher's
    sizes, with the recipe `source_training`."""
    plain = settings.model.model_copy(update={"method": BASELINE_METHOD, "method_options": {}})
    changes = {"model": plain, "training": settings.source_training, "source_training": None}
    return settings.model_copy(update=changes)


def training_flops(job: TrainingJob) -> float:
    """Return the FLOPs of a whole training, including those of a frozen teacher."""
    return replace(Estimate.of(job), steps_done=0).total_flops


@dataclass(frozen=True, kw_only=True)
class Retrofit:
    """A teacher with a source model, and the trainings of its controls."""

    teacher: TrainingJob
    """The teacher's training; without tokens until its source model is trained."""
    source: Source
    source_job: TrainingJob | None
    """The source model's own training from random weights, if it is known."""
    settings: Settings
    """Section `sweep` chooses the controls, and `cluster` says where they are trained."""
    workspace: Workspace

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the controls that the settings choose."""
        return self.settings.sweep.source_controls

    @property
    def trained_layers(self) -> TrainedLayers:
        """The layers that `source_continued` trains: those of the teacher's training. If that
        trains only what it adds, they are the layers that get corrections."""
        trained = self.teacher.recipe.trained_layers
        if trained not in ("corrected", "added"):
            return trained
        return tuple(n for n, count in enumerate(self.teacher.model.corrections, start=1) if count)

    @cached_property
    def candidates(self) -> dict[str, TrainingJob]:
        """Label -> fine-tuning of the source model on as many tokens as the teacher, at each of two
        rates, the teacher's first."""
        if SOURCE_CONTINUED not in self.controls:
            return {}
        rate = self.teacher.recipe.learning_rate
        other_rate = self.source.learning_rate
        if other_rate in (None, rate):
            other_rate = OTHER_RATE_FACTOR * rate
        num_steps = self.teacher.recipe.num_steps
        return {
            f"{EQUAL_TOKENS}, rate {tried_rate:g}": self._continued(tried_rate, num_steps)
            for tried_rate in (rate, other_rate)
        }

    @cached_property
    def diverged(self) -> frozenset[str]:
        """Labels of the candidates that diverged; a retry would diverge again."""
        return frozenset(label for label, job in self.candidates.items() if has_diverged(job))

    @cached_property
    def losses(self) -> dict[str, float]:
        """Label -> validation loss of the candidates, once all are trained; infinite if one
        diverged."""
        losses = dict.fromkeys(self.diverged, math.inf)
        for label, job in self.candidates.items():
            outcome = finished_outcome(job)
            if outcome is not None:
                losses[label] = outcome.validation_loss
        if losses.keys() != self.candidates.keys():
            return {}
        return {label: losses[label] for label in self.candidates}

    @property
    def better_candidate(self) -> str | None:
        """Label of the candidate with the lower loss; None while it is unknown, or if all diverged.

        Without measured losses it is the first trained candidate, preferably that of the teacher's
        rate.
        """

        def loss_or_infinity(label: str) -> float:
            loss = self.losses[label]
            return math.inf if math.isnan(loss) else loss

        trained = [label for label in self.losses if label not in self.diverged]
        return min(trained, key=loss_or_infinity, default=None)

    @cached_property
    def continued(self) -> TrainingJob | None:
        """The fine-tuning of the source model with the teacher's FLOPs.

        None if the settings do not ask for it, or it diverged at each rate. While the better rate
        is unknown, the job has the teacher's rate and no tokens, so it can be priced but not run.
        """
        if self.diverged == self.candidates.keys():  # Also if there are no candidates.
            return None
        label = self.better_candidate or next(iter(self.candidates))
        candidate = self.candidates[label]
        num_steps = steps_at(candidate, training_flops(self.teacher))
        job = self._continued(candidate.recipe.learning_rate, num_steps)
        return job if self.better_candidate else job.model_copy(update={"tokens_folder": ""})

    @cached_property
    def scratch(self) -> dict[str, TrainingJob]:
        """Label -> training of the teacher's model from random weights.

        Raises:
            UserError: If the FLOPs of the source model are needed but unknown.
        """
        flops = {}
        if SCRATCH in self.controls:
            flops[SCRATCH] = training_flops(self.teacher)
        if SCRATCH_WITH_SOURCE in self.controls:
            if self.source_job is None:
                raise UserError(
                    f"sweep.source_controls={SCRATCH_WITH_SOURCE}: the training FLOPs of "
                    f"{self.source.folder} are not known, because it was not trained from random "
                    "weights in this workspace; leave this control out"
                )
            flops[SCRATCH_WITH_SOURCE] = training_flops(self.teacher) + training_flops(
                self.source_job
            )
        return {label: self._from_random_weights(number) for label, number in flops.items()}

    def _continued(self, learning_rate: float, num_steps: int) -> TrainingJob:
        changes = {
            "learning_rate": learning_rate,
            "num_steps": num_steps,
            "trained_layers": self.trained_layers,
            "elastic": None,
        }
        recipe = self.teacher.recipe.model_copy(update=changes)
        return self._with_recipe(recipe, model=self.source.config)

    def _from_random_weights(self, flops: float) -> TrainingJob:
        teacher_recipe = self.teacher.recipe
        # A rate that suits trained weights may be far too low for random ones.
        rate = self.source.learning_rate or teacher_recipe.learning_rate
        recipe = teacher_recipe.without_source().model_copy(update={"learning_rate": rate})
        as_long = self._with_recipe(recipe, initial_folder=None)
        recipe = recipe.model_copy(update={"num_steps": steps_at(as_long, flops)})
        return self._with_recipe(recipe, initial_folder=None)

    def _with_recipe(self, recipe: TrainingSettings, **fields: Any) -> TrainingJob:
        """Return the teacher's training with another recipe and other values of fields."""
        changes = {
            "recipe": recipe,
            "run_folder": "",
            "continued_from": None,
            "storage": self.settings.cluster.storage,
            **fields,
        }
        return in_usual_folder(self.teacher.model_copy(update=changes), self.workspace)

    def settings_of(self, job: TrainingJob) -> Settings:
        """Return the settings of a control's training."""
        model = self.settings.model.model_copy(
            update={"method": job.model.method, "method_options": {}}
        )
        changes = {"model": model, "training": job.recipe, "source_training": None}
        return self.settings.model_copy(update=changes)

    @property
    def trainings_by_control(self) -> dict[str, tuple[str, ...]]:
        """Name of each control -> labels of its trainings."""
        trainings: dict[str, tuple[str, ...]] = {name: (name,) for name in self.controls}
        if SOURCE in trainings:
            trainings[SOURCE] = ()
        if SOURCE_CONTINUED in trainings:
            trainings[SOURCE_CONTINUED] = (*self.candidates, SOURCE_CONTINUED)
        return trainings

    def are_controls(self, labels: Iterable[str]) -> bool:
        """Return whether these are the labels of trainings of controls."""
        control_labels = {
            label for labels in self.trainings_by_control.values() for label in labels
        }
        return control_labels.issuperset(labels)

    def measurable_controls(self, finished: Mapping[str, Path]) -> dict[str, Path]:
        """Return label -> checkpoint of the controls that can be measured.

        Args:
            finished: Label -> checkpoint of the finished models before the trials.
        """
        controls: dict[str, Path] = {}
        if SOURCE in self.controls and self.source.is_checkpoint:
            controls[SOURCE] = self.source.folder
        better = self.better_candidate
        if better is not None and better in finished:
            controls[EQUAL_TOKENS] = finished[better]
        for label in (SOURCE_CONTINUED, *self.scratch):
            if label in finished:
                controls[label] = finished[label]
        return controls

    @property
    def sentences(self) -> dict[str, str]:
        """Name of a control -> its description."""
        return dict(self._described())

    def _described(self) -> Iterator[tuple[str, str]]:
        root = self.workspace.root
        folder = portable_path(str(self.source.folder), root)
        yield SOURCE, f"{folder}, {'as it was' if SOURCE in self.controls else 'not measured'}"
        if self.continued is None:
            reason = ", because it diverges at each rate that is tried" if self.diverged else ""
            yield SOURCE_CONTINUED, f"not trained{reason}"
        else:
            yield SOURCE_CONTINUED, self._text_of_continued(self.continued)
        for label, job in self.scratch.items():
            of_source = " and its source" if label == SCRATCH_WITH_SOURCE else ""
            yield (
                label,
                f"the teacher's model from random weights, {_steps_and_flops(job)}, as the "
                f"teacher{of_source}; rate {job.recipe.learning_rate:g}",
            )

    def _text_of_continued(self, job: TrainingJob) -> str:
        rates = [candidate.recipe.learning_rate for candidate in self.candidates.values()]
        tried = format_count(self.teacher.recipe.num_steps, "step")
        text = f"the source fine-tuned without corrections, {_steps_and_flops(job)}, as the teacher"
        if self.losses:
            losses = " and ".join(
                f"{'diverged' if label in self.diverged else f'{loss:.4f}'} at {rate:g}"
                for (label, loss), rate in zip(self.losses.items(), rates, strict=True)
            )
            text += f"; rate {job.recipe.learning_rate:g}, by the validation losses {losses} after "
            text += f"{tried}, at the teacher's tokens"
        else:
            shown = " and ".join(f"{rate:g}" for rate in rates)
            text += f"; its rate is the better of {shown} after {tried}, at the teacher's tokens"
        if isinstance(self.trained_layers, tuple):
            layers = ", ".join(map(str, self.trained_layers))
            text += f"; it trains layers {layers}"
            if self.teacher.recipe.trained_layers == "added":
                text += ", which get corrections; the teacher trains only what it adds"
        return text


def steps_at(job: TrainingJob, flops: float) -> int:
    """Return the fewest steps with which a training takes at least these FLOPs."""
    # Stages are shares of the steps, so FLOPs are proportional to the steps.
    per_step = training_flops(job) / job.recipe.num_steps
    return max(1, math.ceil(flops / per_step - 1e-9))


def _steps_and_flops(job: TrainingJob) -> str:
    steps = format_count(job.recipe.num_steps, "step")
    return f"{steps} and {training_flops(job):.3g} training FLOPs"


def retrofit_of(
    checkpoint: Path, settings: Settings, workspace: Workspace
) -> tuple[Retrofit | None, str]:
    """Return the retrofit that made a given teacher, or None and why a teacher with a source model
    has none; the reason is empty for any other teacher.

    Args:
        checkpoint: The teacher.
        settings: Of the sweep.
    """
    run = checkpoint.parent
    stored = StoredJob.read(run / JOB_NAME)
    if stored is None or stored.job.objective != "pretrain" or stored.job.initial_folder is None:
        return None, ""
    job = stored.job
    if not job.model.corrections.num_corrections:  # A plain model has only its students.
        return None, ""
    if step_of(checkpoint) != job.recipe.num_steps:
        return None, f"{checkpoint} is not the end of its training, so it has no controls"
    try:
        source = find_source(workspace, stored.job.initial_folder)
        is_unchanged = weights_key(source.folder) == stored.key_fields.get("initial")
    except UserError as error:
        return None, f"the teacher has no controls, because its source cannot be used: {error}"
    if not is_unchanged:
        return None, f"{source.folder} has changed since the teacher was trained from it"
    if (run / SETTINGS_NAME).is_file():  # Controls use the teacher's data.
        teacher_settings = read_settings(run / SETTINGS_NAME)
        changes = {"data": teacher_settings.data, "model": teacher_settings.model}
        settings = settings.model_copy(update=changes)
    teacher = job.model_copy(
        update={
            "run_folder": str(run),
            "tokens_folder": str(tokens_folder_of(checkpoint, workspace)),
        }
    )
    return Retrofit(
        teacher=teacher,
        source=source,
        source_job=training_of_source(source),
        settings=settings,
        workspace=workspace,
    ), ""


def with_retention(
    settings: Settings, retrofit: Retrofit | None, *, teacher_is_plain: bool = False
) -> Settings:
    """Return the settings of a sweep, with the default of `evaluation.retention` filled in.

    Retention compares models with their teacher's source model, or with a plain teacher, for whose
    students there is no default bound.

    Raises:
        UserError: If the settings bound a loss that cannot be measured.
    """
    retention = settings.evaluation.retention
    problem = None
    if retrofit is None and teacher_is_plain:
        retention = retention or {}
    elif retrofit is None:
        problem = "the teacher has corrections but no source, so there is no model to compare with"
    elif SOURCE not in retrofit.controls:
        problem = "models are compared with the source, and sweep.source_controls does not name it"
    if retention is None:
        reads_text = retrofit is not None and _reads_text(retrofit)
        retention = DEFAULT_RETENTION if reads_text and not problem else {}
    elif retrofit is not None and not _reads_text(retrofit):
        for name in {RETENTION_BITS, SHORT_ANSWERS} & retention.keys():
            problem = f"{name} is measured on English text, and the source reads symbols alone"
    if retention and problem:
        raise UserError(f"evaluation.retention={retention}: {problem}; leave it out")
    evaluation = settings.evaluation.model_copy(update={"retention": retention})
    return settings.model_copy(update={"evaluation": evaluation})


def _reads_text(retrofit: Retrofit) -> bool:
    """Return whether the teacher's data have text, or words of a text's tokenizer. Without tokens
    the settings decide."""
    if retrofit.settings.data.has_words:
        return True
    tokens = retrofit.teacher.tokens_folder
    if tokens:
        return LAST_WORD in offered_tasks(open_data(tokens))
    return LAST_WORD in tasks_of_source(retrofit.settings.data)


def training_of_source(source: Source) -> TrainingJob | None:
    """Return the training that made a source model from random weights; None if it is unknown."""
    job = TrainingJob.of_folder(source.folder.parent)
    return job if job is not None and job.initial_folder is None else None
