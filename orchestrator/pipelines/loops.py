"""Models at several depths: one front of them, and what each loop of a looped model changes.

The models are those trained here, under their iteration schedules, and those of other projects,
at the depths that `models.loops` knows. They are evaluated as by `evaluate`, and found again in the
same store; nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, computed_field
from rich.console import RenderableType
from torch import Tensor
from torch.nn.functional import cosine_similarity

from orchestrator.cluster.work import command_place
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import newest_tokens
from orchestrator.data.store import TokenStore
from orchestrator.evaluation.decode_timing import cost_of, load_side_by_side, time_per_token
from orchestrator.evaluation.looped import load_transformers, watch_loops
from orchestrator.models.loops import Depth
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import EvaluatePlan, plan_evaluate, run_evaluate
from orchestrator.records.evaluation import Suite
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.records.trial import OtherModel, Trial
from orchestrator.reporting.result import Result
from orchestrator.reporting.results import PROVENANCE_TITLE, SETTINGS_TITLE, StoredSweep
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.settings import ClusterSettings, Settings, flatten
from orchestrator.sweeping.costs import TIMES_NAME, StoredCosts
from orchestrator.sweeping.models import check_sweep
from orchestrator.sweeping.plan import cost_numbers
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import now_ms, record_event
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key, environment, timing_environment

MOST_TOKENS = 256
"""Tokens of a row of text."""
ROWS_AT_ONCE = 8
LOOP_NUMBERS = ("turned", "step", "changed_tokens")


# A front


class DepthPlan(Result):
    """Models that are evaluated at each depth, and the sweep that gets their front."""

    row_key = "tasks"

    name: str
    """Name of the sweep."""
    evaluation: EvaluatePlan = Field(exclude=True)
    """The models, each at each depth, and how they are evaluated."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tasks(self) -> list[dict[str, str]]:
        """One entry per model and task: `model`, `task`, `state`."""
        return self.evaluation.tasks

    def shown(self) -> Iterable[RenderableType]:
        """Return what is evaluated."""
        return self.evaluation.shown()


def plan_depths(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> DepthPlan:
    """Open the models of a sweep of kind `depth`, each at each depth.

    Args:
        settings: `sweep.models` and `sweep.depths`, and section `evaluation`.
        trust_remote_code: Whether code in a model folder may run.

    Raises:
        UserError: As `evaluate`; or if the cost of a model is not known, or a setting is for other
            kinds of sweeps.
    """
    check_sweep(settings)
    evaluation = plan_evaluate(
        settings,
        workspace=workspace,
        models=settings.sweep.models,
        schedules=[str(depth) for depth in settings.sweep.depths],
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    for model in evaluation.opened.values():
        if model.config is None and model.loops is None:
            raise UserError(
                f"{model.path} is a {model.architecture} model, whose cost is not known; a front "
                "takes looped models of a known kind, Llamas, and those trained here"
            )
    suite_values = settings.evaluation.model_dump(mode="json")
    if settings.evaluation.sequence_length is None:
        del suite_values["sequence_length"]  # What is off is absent, so that names are as before.
    key = content_key([list(model.key) for model in evaluation.opened.values()], suite_values)
    return DepthPlan(name=f"depth-{key[:8]}", evaluation=evaluation)


def run_depths(plan: DepthPlan, context: Context) -> ReportResult:
    """Evaluate models at each depth, and write a report with all of them on one front."""
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    measured = run_evaluate(plan.evaluation, context)
    workspace = context.workspace
    trials = []
    for label, model in plan.evaluation.opened.items():
        keys = measured.keys[label]
        key = content_key("loops", list(model.key), keys.tasks)
        architecture = None
        if model.loops:
            architecture = OtherModel(num_layers=model.loops.num_layers, **model.parameters())
        trial = Trial(
            key=key,
            role="trial",
            label=label,
            folder=str(workspace.trials / key),
            checkpoint=str(model.path),
            suite=Suite(),
            evaluation=keys,
            model=None if model.loops else model.config,
            architecture=architecture,
        )
        trials.append(trial.with_numbers("quality", measured.evaluations[label].quality()))
    stored = StoredSweep(
        name=plan.name,
        key=content_key("depth", [trial.key for trial in trials]),
        results=tuple(_with_depth_costs(trials, plan, context)),
        facts={
            SETTINGS_TITLE: flatten(plan.evaluation.settings),
            PROVENANCE_TITLE: {"kind": "depth", "models": len(trials), **environment()},
        },
    )
    report = write_sweep_report(workspace, stored, tracking=lambda: context.tracking)
    # Commands without a name take the newest sweep.
    record_event(stored.folder(workspace), "finished")
    return report


def _with_depth_costs(trials: Sequence[Trial], plan: DepthPlan, context: Context) -> list[Trial]:
    """Add what each model costs: exact counts, and milliseconds.

    Counts of a model that transformers runs need its weights, so they are stored with the times.
    """
    workspace = context.workspace
    cluster = plan.evaluation.settings.cluster
    opened = plan.evaluation.opened.values()
    models = {trial.key: model for trial, model in zip(trials, opened, strict=True)}
    path = workspace.sweeps / plan.name / TIMES_NAME
    state = content_key([*models], timing_environment(), cluster.device)
    costs = StoredCosts.read(path)
    if costs is None or costs.state != state:
        measure = partial(_measure_costs, models, plan.evaluation.trust_remote_code)
        by_name = command_place(cluster, workspace.root).run(measure, context.progress)
        costs = StoredCosts(state=state, by_name=by_name)
        costs.write(path)
    return [trial.with_numbers("cost", costs.by_name[trial.key]) for trial in trials]


def _measure_costs(
    models: Mapping[str, OpenedModel], trust_remote_code: bool, device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    progress.start("time per token")  # Models take their time to load.
    decoders = load_side_by_side(models, device, trust_remote_code=trust_remote_code)
    times = time_per_token(decoders, progress)
    costs = {}
    for name, decoder in decoders.items():
        counts = cost_numbers(cost_of(decoder)())
        known_counts = {unit: count for unit, count in counts.items() if not math.isnan(count)}
        costs[name] = known_counts | times[name]
    return costs


# What each loop changes


class LoopInfluence(Result):
    """What each loop of a model changes, over held-out text."""

    row_key = "loops"

    model: Path
    """The model."""
    depth: Depth
    """Under which it was measured."""
    num_tokens: int
    """Over how many tokens."""
    loops: list[dict[str, Any]]
    """For each loop from the second on: `turned`, the mean of 1 - cosine of the states before and
    after it; `step`, the mean length of their difference; `changed_tokens`, the share of positions
    whose most likely token differs from that of the model at one loop less."""
    notes: tuple[str, ...]
    """From which loop on the steps do not shrink."""

    def shown(self) -> Iterable[RenderableType]:
        """Return the table, and the notes."""
        columns = [Column(name) for name in ("loop", "1 - cos", "step", "token changes")]
        rows = []
        for row in self.loops:
            cells = [
                str(row["loop"]),
                f"{row['turned']:.3g}",
                f"{row['step']:.3g}",
                f"{row['changed_tokens']:.1%}",
            ]
            rows.append(TableRow(cells))
        depth = ",".join(map(str, self.depth))
        yield Table(columns, rows, f"Loops of {self.model.name} at depth {depth}")
        yield from (f"  {note}" for note in self.notes)


class LoopInfluencePlan(Result):
    """A looped model, and the text that its loops are measured on."""

    opened: OpenedModel = Field(exclude=True)
    model: str
    """Name of the model."""
    tokens_folder: Path
    """The text."""
    num_tokens: int
    """Over how many tokens."""
    trust_remote_code: bool
    """Whether code in its folder may run."""
    cluster: ClusterSettings = Field(exclude=True)

    def shown(self) -> Iterable[RenderableType]:
        """Return what is measured."""
        yield f"loops of {self.model}: {self.num_tokens:,} tokens of {self.tokens_folder.name}"


def plan_loop_influence(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str,
    schedule: str | None = None,
    trust_remote_code: bool = False,
) -> LoopInfluencePlan:
    """Open a looped model of another project at a depth, by default its own.

    Args:
        settings: `influence.num_tokens`, and section `cluster`.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        UserError: If it is not such a model, or the workspace has no text.
    """
    space = find_workspace(workspace)
    opened = open_model(model, space, schedule)
    if opened.loops is None:
        raise UserError(
            f"{opened.path} ({opened.architecture}) is no looped model of another project, and "
            "--schedule and --trust-remote-code are for these; leave them out"
        )
    return LoopInfluencePlan(
        opened=opened,
        model=opened.label,
        tokens_folder=newest_tokens(space),
        num_tokens=settings.influence.num_tokens,
        trust_remote_code=trust_remote_code,
        cluster=settings.cluster,
    )


def run_loop_influence(plan: LoopInfluencePlan, context: Context) -> LoopInfluence:
    """Measure how much each loop of a model changes."""
    started_ms = now_ms()
    model = plan.opened
    _, depth = model.looped()
    context.progress.start("influence of loops", depth[0])
    place = command_place(plan.cluster, context.workspace.root)
    rows, num_tokens = place.run(partial(_measure_loops, plan), context.progress)
    notes: tuple[str, ...] = ()
    growing = [row["loop"] for before, row in pairwise(rows) if row["step"] >= before["step"]]
    if growing:
        notes = (
            f"the steps do not shrink from loop {growing[0]} on: perhaps more loops than the model "
            "was trained for",
        )
    context.progress.finish(f"{len(rows)} loops over {num_tokens:,} tokens")
    measured = TrackedRun.of(
        key=content_key("loops", list(model.key), num_tokens, plan.tokens_folder.name),
        name=f"influence of the loops of {model.label}"[:80],
        kind="influence",
        params={**model.parameters(), "checkpoint": model.path},
        points=[(f"loops/{name}", row[name], row["loop"]) for row in rows for name in LOOP_NUMBERS],
    )
    context.log_measurement(measured, started_ms)
    return LoopInfluence(
        model=model.path, depth=depth, num_tokens=num_tokens, loops=rows, notes=notes
    )


def _measure_loops(
    plan: LoopInfluencePlan, device: str, progress: Progress
) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each loop from the second on, and the number of tokens."""
    model = plan.opened
    loops, depth = model.looped()
    trusts = plan.trust_remote_code

    # Held-out text, as the model reads it.
    parts = open_data(plan.tokens_folder).parts
    data = next((part for part in parts if isinstance(part, TokenStore)), None)
    if data is None:
        raise UserError(
            f"loops are measured on text, and the data {plan.tokens_folder.name} has none"
        )
    text = load_tokenizer(data.tokenizer_path).decode(data.validation[: plan.num_tokens].tolist())
    ids = model.tokenizer(trust_remote_code=trusts).encode(text, add_special_tokens=False)
    length = min(MOST_TOKENS, model.context_length, len(ids))
    num_whole_rows = len(ids) // length
    rows = torch.tensor(ids[: num_whole_rows * length], device=device).view(-1, length)

    # A row for each loop, a column for each of `LOOP_NUMBERS`. The model runs at each number of
    # loops, for its likeliest tokens; states are compared in the last of these runs.
    sums = torch.zeros(depth[0], len(LOOP_NUMBERS), dtype=torch.float64)
    likeliest: list[Tensor] = []
    for count in range(1, depth[0] + 1):
        opened = replace(model, depth=(count, *depth[1:]))
        loaded = load_transformers(opened, trust_remote_code=trusts, device=device)
        likeliest_before = likeliest
        likeliest = []
        with torch.no_grad(), watch_loops(loaded, loops) as (_, states):
            for batch_rows in torch.split(rows, ROWS_AT_ONCE):
                states.clear()
                likeliest.append(loaded(batch_rows, use_cache=False).logits.argmax(-1))
                if count == depth[0]:
                    for loop, (old, new) in enumerate(pairwise(states), start=1):
                        sums[loop, 0] += (1 - cosine_similarity(old, new, -1)).double().sum().cpu()
                        sums[loop, 1] += (new - old).norm(dim=-1).double().sum().cpu()
        # The first run has no tokens before.
        for old, new in zip(likeliest_before, likeliest, strict=False):
            sums[count - 1, 2] += (old != new).sum().cpu()
        progress.advance(count)
    means = (sums / rows.numel()).tolist()
    numbers_of_loops = [
        {"loop": loop, **dict(zip(LOOP_NUMBERS, row, strict=True))}
        for loop, row in enumerate(means, start=1)
    ]
    return numbers_of_loops[1:], rows.numel()
