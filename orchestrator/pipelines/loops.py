"""Looped models at several depths: one front of them, and what each loop changes.

The models are those trained here, under their iteration schedules, and those of other projects,
at the depths that `models.loops` knows. They are evaluated as by `evaluate`, and found again in the
same store; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, computed_field
from rich.console import RenderableType
from torch import Tensor
from torch.nn.functional import cosine_similarity

from iiet.config import ModelConfig
from orchestrator.cluster.task import command_device
from orchestrator.data.preparation import newest_tokens
from orchestrator.evaluation.looped import load_transformers, watched
from orchestrator.models.lookup import find_model_folder
from orchestrator.models.loops import Depth
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import EvaluatePlan, run_evaluate
from orchestrator.pipelines.reports import ReportResult
from orchestrator.pipelines.result import Result
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.results import StoredSweep
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.settings import ClusterSettings, Settings, flatten
from orchestrator.sweeping.decode import text_of
from orchestrator.sweeping.plan import exact_cost
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import Journal, now_ms
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key, environment

MOST_TOKENS = 256
"""Tokens of a row of text."""
ROWS_AT_ONCE = 8
BYTES_PER_NUMBER = 4
"""Of keys and values, as the cost of our models counts them."""


# A front


class FrontPlan(EvaluatePlan):
    """Models that are evaluated, and the name of the sweep that gets their front."""

    name: str


def plan_front(plan: EvaluatePlan, name: str) -> FrontPlan:
    """Return the plan that also puts the models of an evaluation on one front.

    Raises:
        UserError: If the cost of a model is not known.
    """
    for model in plan.opened:
        if model.config is None and model.loops is None:
            raise UserError(
                f"{model.path} is a {model.architecture} model, whose cost is not known; a front "
                "takes looped models of a known kind, Llamas, and those trained here"
            )
    return FrontPlan(name=name, **{n: getattr(plan, n) for n in EvaluatePlan.model_fields})


def run_front(plan: FrontPlan, context: Context) -> ReportResult:
    """Evaluate models, and write a report with all of them on one front."""
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    found, workspace = run_evaluate(plan, context), context.workspace
    measured = zip(plan.opened, found.evaluations.items(), found.keys.values(), strict=True)
    trials = [
        _trial(model, name, workspace)
        .with_numbers("quality", evaluation.quality())
        .model_copy(update={"evaluation": keys})
        for model, (name, evaluation), keys in measured
    ]
    stored = StoredSweep(
        name=plan.name,
        key=content_key("depth", [trial.key for trial in trials]),
        results=tuple(trials),
        facts={
            "Settings": flatten(plan.settings),
            "Provenance": {"kind": "depth", "models": len(trials), **environment()},
        },
    )
    written = write_sweep_report(workspace, stored, tracking=lambda: context.tracking)
    journal = Journal(stored.folder(workspace))
    journal.event("finished")  # Commands without a name take the newest sweep.
    journal.close()
    return ReportResult.of(written, workspace)


def _trial(model: OpenedModel, name: str, workspace: Workspace) -> Trial:
    """Return a model that was measured without training, with its exact cost."""
    key = content_key("loops", list(model.key))
    config, architecture = model.config, None
    if config is not None:
        cost = exact_cost(config, config)
    else:
        architecture, loops, depth = model.architecture, model.loops, model.depth
        assert loops is not None, "the plan takes no others"
        assert depth is not None, "a looped model has one"
        dim = loops.number("hidden_size", "n_embd")
        # Reports read the number of layers alone; the other sizes say what a decoder can.
        config = ModelConfig(
            method="vanilla",
            vocab_size=loops.number("vocab_size"),
            dim=dim,
            num_layers=loops.num_layers,
            num_heads=1,
            num_kv_heads=1,
            ffn_dim=4 * dim,
            context_length=model.context_length,
        )
        cost = {
            "evaluations": loops.layer_runs(depth),
            "kv_bytes_per_token": BYTES_PER_NUMBER * loops.kv_numbers(depth),
        }
    trial = Trial(
        key=key,
        role="trial",
        label=name,
        model=config,
        architecture=architecture,
        folder=str(workspace.trials / key),
        checkpoint=str(model.path),
        suite=TrialSuite(tokens_folder=""),
    )
    known = {n: v for n, v in cost.items() if not n.startswith("relative_")}
    return trial.with_numbers("cost", known)


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
        rows = [
            TableRow(
                (
                    str(row["loop"]),
                    f"{row['turned']:.3g}",
                    f"{row['step']:.3g}",
                    f"{row['changed_tokens']:.1%}",
                )
            )
            for row in self.loops
        ]
        shown = ",".join(map(str, self.depth))
        yield Table(columns, rows, f"Loops of {self.model.name} at depth {shown}")
        yield from (f"  {note}" for note in self.notes)


class LoopInfluencePlan(Result):
    """A looped model, and the text that its loops are measured on."""

    opened: OpenedModel = Field(exclude=True)
    tokens_folder: Path
    """The text."""
    num_tokens: int
    """Over how many tokens."""
    trust_remote_code: bool
    """Whether code in its folder may run."""
    cluster: ClusterSettings = Field(exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def model(self) -> str:
        """Its name."""
        return self.opened.name

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
    progress: Progress | None = None,  # noqa: ARG001  # As of every plan.
) -> LoopInfluencePlan:
    """Open a looped model of another project; the workspace's newest tokens are the text.

    Args:
        settings: `influence.num_tokens`, and section `cluster`.
        schedule: Depth; the model's own when unset.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        UserError: If it is not such a model, or the workspace has no text.
    """
    space = find_workspace(workspace)
    opened = open_model(find_model_folder(space, Path(model), model_folders=True), schedule)
    if opened.loops is None:
        raise UserError(
            f"{opened.path} is a {opened.architecture} model, whose loops are not known"
        )
    return LoopInfluencePlan(
        opened=opened,
        tokens_folder=newest_tokens(space),
        num_tokens=settings.influence.num_tokens,
        trust_remote_code=trust_remote_code,
        cluster=settings.cluster,
    )


def run_loop_influence(plan: LoopInfluencePlan, context: Context) -> LoopInfluence:
    """Measure how much each loop of a model changes."""
    started_ms, model = now_ms(), plan.opened
    on_device = command_device(plan.cluster, context.workspace.root)
    assert model.depth is not None, "the plan takes looped models only"
    context.progress.start("influence of loops", model.depth[0])
    rows, num_tokens = on_device(partial(_measure_loops, plan), context.progress)
    growing = [b["loop"] for a, b in pairwise(rows) if b["step"] >= a["step"]]
    notes = []
    if growing:
        notes.append(
            f"the steps do not shrink from loop {growing[0]} on: perhaps more loops than the model "
            "was trained for"
        )
    context.progress.finish(f"{len(rows)} loops over {num_tokens:,} tokens")
    context.log_measurement(
        TrackedRun.of(
            key=content_key("loops", list(model.key), num_tokens, plan.tokens_folder.name),
            name=f"influence of the loops of {model.name}"[:80],
            kind="influence",
            params={
                "method": model.architecture,
                "depth": ",".join(map(str, model.depth)),
                "checkpoint": model.path,
            },
            points=[
                (f"loops/{name}", row[name], row["loop"])
                for row in rows
                for name in ("turned", "step", "changed_tokens")
            ],
        ),
        started_ms,
    )
    return LoopInfluence(
        model=model.path, depth=model.depth, num_tokens=num_tokens, loops=rows, notes=tuple(notes)
    )


def _measure_loops(
    plan: LoopInfluencePlan, device: str, progress: Progress
) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each loop from the second on, and the number of tokens."""
    model = plan.opened
    loops, depth = model.loops, model.depth
    assert loops is not None, "the plan takes looped models only"
    assert depth is not None, "a looped model has one"

    # Held-out text, as the model reads it.
    data = text_of(plan.tokens_folder)
    text = load_tokenizer(data.tokenizer_path).decode(data.validation[: plan.num_tokens].tolist())
    reads = model.tokenizer(trust_remote_code=plan.trust_remote_code)
    ids = reads.encode(text, add_special_tokens=False)
    length = min(MOST_TOKENS, model.context_length, len(ids))
    rows = torch.tensor(ids[: len(ids) // length * length], device=device).view(-1, length)

    sums = torch.zeros(depth[0], 3, dtype=torch.float64)
    likely: list[Tensor] = []
    for count in range(1, depth[0] + 1):  # The most likely tokens at each depth.
        loaded = load_transformers(
            model.path,
            loops,
            (count, *depth[1:]),
            trust_remote_code=plan.trust_remote_code,
            device=device,
        )
        before, likely = likely, []
        with torch.no_grad(), watched(loaded, loops) as (_, states):
            for batch_rows in torch.split(rows, ROWS_AT_ONCE):
                states.clear()
                likely.append(loaded(batch_rows, use_cache=False).logits.argmax(-1))
                if count == depth[0]:
                    for loop, (old, new) in enumerate(pairwise(states), start=1):
                        sums[loop, 0] += (1 - cosine_similarity(old, new, -1)).double().sum().cpu()
                        sums[loop, 1] += (new - old).norm(dim=-1).double().sum().cpu()
        for old, new in zip(before, likely, strict=False):
            sums[count - 1, 2] += (old != new).sum().cpu()
        progress.advance(count)
    means = (sums / rows.numel()).tolist()
    names = ("turned", "step", "changed_tokens")
    found = [{"loop": n, **dict(zip(names, row, strict=True))} for n, row in enumerate(means, 1)]
    return found[1:], rows.numel()
