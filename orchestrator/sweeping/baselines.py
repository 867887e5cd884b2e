"""Choose the models that stand beside a teacher's front: found in the workspace, or distilled.

Those that are found have the same tokens, shape and recipe; their number of layers is the
teacher's, or one that the settings ask for. Those that are distilled are other ways to save the
FLOPs that students save. `vanilla` is a plain decoder of the teacher's width with random weights;
it has as many layers as a student has evaluations, so it may have more weights than the teacher.
`fewer_layers` is the teacher without its least important layers, by block influence; the kept
layers make as many corrections as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from orchestrator.models.folder import check_checkpoint, load_config, load_provenance
from orchestrator.models.lookup import run_folders
from orchestrator.records.training import TrainingOutcome
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import BASELINE_METHOD, Settings, SweepSettings, TrainingSettings
from orchestrator.settings.training import MAX_LAYERS, MAX_STEPS
from orchestrator.sweeping.models import (
    ModelVariant,
    learning_rates,
    model_label,
    values_of_model,
)
from orchestrator.sweeping.trials import student_job, trained_trial
from orchestrator.terminal.render import format_count
from orchestrator.training.dropping import kept_config, most_important_layers
from orchestrator.training.job import NON_KEY_FIELDS
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import DONE_NAME, Workspace, checkpoint_name, find_checkpoints


@dataclass(frozen=True)
class Baselines:
    """Baselines of a teacher."""

    found: dict[str, Path]
    """Label to checkpoint."""
    left_out: dict[str, str]
    """Name of a run that cannot be a baseline, to the reason."""


def find_baselines(
    workspace: Workspace, teacher: Path, layers: Mapping[str, int | tuple[int, ...]] | None = None
) -> Baselines:
    """Return the workspace's newest models without corrections that can be a teacher's baselines.

    Damaged runs are reported. A run that was trained differently is reported only if there is no
    other model of its kind.

    Args:
        layers: Numbers of layers that differ from the teacher's, as in `sweep.num_layers`.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    unlike: dict[str, tuple[str, str]] = {}
    full = load_config(teacher)
    wanted = _comparable(full, load_provenance(teacher))
    for run in sorted(run_folders(workspace), key=last_recorded):
        damage: list[UserError] = []
        for checkpoint in reversed(find_checkpoints(run)):
            try:
                config, provenance = load_config(checkpoint), load_provenance(checkpoint)
                break
            except UserError as error:
                damage.append(error)
        else:
            if damage:
                left_out[run.name] = f"the run {run.name} is left out: {damage[0]}"
            continue
        if config.corrections.num_corrections or "imported" in provenance:
            continue

        label, number = model_label(config.method, 0), config.num_layers
        asked = values_of_model(layers or {}, (label, config.method), default=full.num_layers)
        if number in asked and number != full.num_layers:
            label = model_label(config.method, 0, number)
        own = {"model.num_layers": number} if number in asked else {}
        reason = _difference(_comparable(config, provenance), wanted | own)
        if not reason and number not in asked:
            reason = f"it has {format_count(number, 'layer')}, which sweep.num_layers leaves out"
        if not reason and not (run / DONE_NAME).exists():
            reason = "its training is not finished"
        if reason:
            unlike[label] = (run.name, f"{label} is left out: {reason}")
            continue

        remedy = "delete it, and the same training again writes it"
        try:
            outcome = TrainingOutcome.read(run / DONE_NAME, remedy=remedy)
            assert outcome, "the file exists"
            check_checkpoint(run / checkpoint_name(outcome.step))
            found[label] = run / checkpoint_name(outcome.step)
        except UserError as error:
            left_out[run.name] = f"{label} is left out: {error}"
    left_out |= dict(pair for label, pair in unlike.items() if label not in found)
    return Baselines(found, left_out)


def _difference(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return how a model differs from a teacher apart from corrections; empty if it does not."""
    parts = [
        f"{name} is {own.get(name)!r} and the teacher's {wanted.get(name)!r}"
        for name in dict.fromkeys([*own, *wanted])
        if own.get(name) != wanted.get(name)
    ]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more


def _comparable(config: ModelConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    # Each method may have its own best learning rate, and only corrections have two stages.
    free = ("iterate_from_fraction", "iterate_ramp_fraction", "learning_rate", *NON_KEY_FIELDS)
    # A checkpoint from before a setting existed was made as its default makes one.
    recipe = {**TrainingSettings().model_dump(mode="json"), **provenance.get("recipe", {})}
    of_method = ("method", "method_options", "schedule")
    shape = {name: value for name, value in config.to_dict().items() if name not in of_method}
    return {
        **{f"model.{name}": value for name, value in shape.items()},
        "tokens": provenance.get("tokens"),
        **{f"training.{name}": value for name, value in recipe.items() if name not in free},
    }


@dataclass(frozen=True, kw_only=True)
class DistilledBaseline:
    """A baseline that learns from the teacher as its students do."""

    label: str
    """Name in tables and figures."""
    config: ModelConfig
    """The model."""
    kept_layers: tuple[int, ...] | None = None
    """Layers of the teacher that it starts from; None starts from random weights."""


def choose_distilled_baselines(
    sweep: SweepSettings,
    full: ModelConfig,
    members: Sequence[FamilyMember],
    influence: InfluenceTable,
) -> list[DistilledBaseline]:
    """Return the baselines that a sweep asks for, cheapest first within each kind.

    For each student the one whose FLOPs per decoded token are nearest is taken, and of these the
    number asked for, spread from the cheapest to the costliest.

    Args:
        sweep: Kinds and number of baselines.
        full: The teacher.
        members: Schedules of the students; the teacher's own counts only if it is the only one.
        influence: The teacher's table.

    Raises:
        UserError: If the teacher has one layer and a baseline is to have fewer.
    """
    schedules = {member.schedule for member in members}
    cheaper = (schedules - {full.schedule}) or schedules
    costs = sorted(_flops(replace(full, schedule=schedule)) for schedule in cheaper)
    found: list[DistilledBaseline] = []
    for kind in dict.fromkeys(sweep.distilled_baselines):
        candidates = (
            _vanilla(full) if kind == "vanilla" else _fewer_layers(full, influence.layer_values)
        )
        flops = [_flops(candidate.config) for candidate in candidates]
        nearest = {
            min(range(len(flops)), key=lambda number: abs(flops[number] - cost)) for cost in costs
        }
        numbers = _spread(sorted(nearest), sweep.num_distilled_baselines)
        found += [candidates[number] for number in numbers]
    return found


def distilled_baseline_trials(
    settings: Settings,
    workspace: Workspace,
    *,
    teacher: Path,
    members: Sequence[FamilyMember],
    influence: InfluenceTable,
    suite: TrialSuite,
) -> list[Trial]:
    """Return the trials of the chosen baselines, with each of the sweep's seeds."""
    full, num_tokens = load_config(teacher), _tokens_seen(teacher)
    baselines = choose_distilled_baselines(settings.sweep, full, members, influence)
    trials = []
    for seed in settings.sweep.seeds or (None,):
        for baseline in baselines:
            job = student_job(
                settings.distillation,
                teacher=teacher,
                config=baseline.config,
                tokens_folder=suite.tokens_folder,
            )
            assert job is not None, "check_sweep refuses controls"
            own: dict[str, Any] = {"kept_layers": baseline.kept_layers}
            if baseline.kept_layers is None:
                own = {"recipe": vanilla_recipe(settings, num_tokens), "initial_folder": None}
            job = job.model_copy(update=own)
            label = baseline.label
            trials.append(trained_trial("baseline", label, job, suite, workspace, seed=seed))
    return trials


def baselines_upper_bound(
    settings: Settings, teacher: ModelConfig
) -> list[tuple[ModelConfig, TrainingSettings]]:
    """Return the baselines of a teacher whose influence is unknown, each as the costliest.

    Each vanilla model has the most layers, and no other baseline drops any.

    Raises:
        UserError: If the teacher has one layer and a baseline is to have fewer.
    """
    most, models = settings.sweep.num_distilled_baselines, []
    num_tokens = settings.training.num_steps * settings.training.num_tokens_per_step
    for kind in dict.fromkeys(settings.sweep.distilled_baselines):
        if kind == "vanilla":
            models += [(_vanilla(teacher)[-1].config, vanilla_recipe(settings, num_tokens))] * most
        else:
            num_fewer = len(_fewer_layers(teacher, (0.0,) * teacher.num_layers))
            models += [(teacher, settings.distillation.training)] * min(most, num_fewer)
    return models


def vanilla_recipe(settings: Settings, teacher_tokens: int) -> TrainingSettings:
    """Return how distilled vanilla models train: as students, but from random weights.

    So they take the learning rate of vanilla models that are trained from scratch, and train on as
    many tokens as the students' weights have seen, in the teacher's training and in their own.

    Args:
        teacher_tokens: Tokens that the teacher was trained on.
    """
    recipe = settings.distillation.training
    rate = learning_rates(settings, ModelVariant(method=BASELINE_METHOD))[0]
    own_steps = recipe.num_steps + math.ceil(teacher_tokens / recipe.num_tokens_per_step)
    steps = settings.sweep.distilled_vanilla_steps or min(own_steps, MAX_STEPS)
    return recipe.model_copy(update={"learning_rate": rate, "num_steps": steps})


def _tokens_seen(checkpoint: Path) -> int:
    """Return the number of tokens a checkpoint was trained on; 0 if it is not known."""
    provenance = load_provenance(checkpoint)
    per_step = provenance.get("recipe", {}).get("num_tokens_per_step", 0)
    return int(provenance.get("step", 0) * per_step)


def _vanilla(full: ModelConfig) -> list[DistilledBaseline]:
    """Return the vanilla models of one layer and more, up to the teacher's evaluations."""
    vanilla = replace(full, method=BASELINE_METHOD, method_options=None, schedule=None)
    most = min(MAX_LAYERS, sum(full.evaluations_per_layer()))
    return [
        DistilledBaseline(
            label=f"{BASELINE_METHOD}, {format_count(count, 'layer')}, distilled",
            config=replace(vanilla, num_layers=count),
        )
        for count in range(1, 1 + most)
    ]


def _fewer_layers(full: ModelConfig, importance: Sequence[float]) -> list[DistilledBaseline]:
    """Return the teacher with one layer, with two, and so on; not with all."""
    if full.num_layers == 1:
        raise UserError(
            "sweep.distilled_baselines: a teacher of one layer has no layer to drop; leave "
            "fewer_layers out"
        )
    kept = [most_important_layers(importance, count) for count in range(1, full.num_layers)]
    return [
        DistilledBaseline(
            label=f"{len(layers)} of {full.num_layers} layers",
            config=kept_config(full, layers),
            kept_layers=layers,
        )
        for layers in kept
    ]


def _flops(config: ModelConfig) -> float:
    return inference_cost(config).decode_flops_per_token


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most that many of the numbers: the first, the last, and evenly between them."""
    if len(numbers) <= most:
        return list(numbers)
    if most == 1:
        return [numbers[len(numbers) // 2]]
    return [numbers[round(n * (len(numbers) - 1) / (most - 1))] for n in range(most)]
