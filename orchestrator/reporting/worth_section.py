"""Section of a report: what corrections are worth in layers, from the trials of finished sweeps.

Models that were trained from scratch are compared with vanilla models of the same width, on the
same tokens and in as many steps; students of a teacher are left out. Of a model's learning rates
the one with the most seeds counts, and of these the one with the lowest loss. `correction_worth`
has the formula and the rules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

from orchestrator.records.trial import Trial
from orchestrator.reporting.bootstrap import INTERVAL_LEVEL, NUM_RESAMPLES
from orchestrator.reporting.correction_worth import (
    SATURATED_ACCURACY,
    CorrectionWorth,
    MeasuredModel,
    correction_worth,
    depths_without_gain,
)
from orchestrator.reporting.markdown import bullets, markdown_table
from orchestrator.settings import BASELINE_METHOD
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.layout import ResponsiveLayout
from orchestrator.training.job import NON_KEY_FIELDS
from orchestrator.workspace.provenance import content_key

WORTH_TITLE = "What a correction is worth"
WORTH_HEADS = ("model", "layers", "NFE/layer", "seeds", "loss", "as vanilla of", "phi")
WORTH_EXPLANATION = (
    "phi = log(L'/L) / log(e), for a model of L layers with e evaluations per layer (1 + r for an "
    "IIET with r corrections; the mean where layers differ): 1 if an evaluation is worth a layer, "
    "0 if more evaluations are worth nothing. L' is the smallest depth at which vanilla, trained "
    "on the same tokens, reaches the model's validation loss, interpolated linearly in the "
    f"logarithm of depth. Of {NUM_RESAMPLES:,} draws of the seeds the interval holds "
    f"{INTERVAL_LEVEL:.0%}; a bound marked < or > lies beyond the vanilla depths. There is no phi "
    "where the losses of vanilla do not bracket the model's, where the accuracy of the model or of "
    f"the deeper vanilla model beside it is {SATURATED_ACCURACY:.0%} or more, or where the two "
    "vanilla models beside it do not differ significantly. Published for loops over a stack: 0.46 "
    "(arXiv 2604.21106)."
)


@dataclass(frozen=True, kw_only=True)
class WorthRow:
    """One model with what its evaluations are worth."""

    name: str
    model: MeasuredModel
    worth: CorrectionWorth

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts under `WORTH_HEADS`."""
        model, layers = self.model, self.worth.equivalent_layers
        return (
            self.name,
            str(model.num_layers),
            f"{model.evaluations_per_layer:.3g}",
            str(len(model.losses)),
            f"{model.loss:.4g}",
            "" if layers is None else f"{layers:.2f} layers",
            _phi_text(self.worth),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        interval = self.worth.interval
        return {
            "name": self.name,
            "num_layers": self.model.num_layers,
            "evaluations_per_layer": self.model.evaluations_per_layer,
            "seeds": len(self.model.losses),
            "validation_loss": self.model.loss,
            "equivalent_layers": self.worth.equivalent_layers,
            "phi": self.worth.phi,
            "phi_interval": interval and [interval.low, interval.high],
            "interval_is_open": list(self.worth.is_open),
            "refusal": self.worth.refusal,
        }


@dataclass(frozen=True, kw_only=True)
class WorthSection:
    """The section in all formats."""

    rows: tuple[WorthRow, ...]
    vanilla: tuple[Mapping[int, MeasuredModel], ...]
    """Number of layers -> the vanilla model, for each set of models that compare."""

    @property
    def has_phi(self) -> bool:
        """Whether it could be said for any model."""
        return any(row.worth.phi is not None for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """The vanilla models, and why models have no phi."""
        notes = []
        for models in self.vanilla:
            depths = ", ".join(
                f"{format_count(depth, 'layer')} {model.loss:.4g}"
                for depth, model in sorted(models.items())
            )
            notes.append(f"Validation loss of vanilla: {depths}.")
            if flat := depths_without_gain(list(models.values())):
                numbers = " and ".join(map(str, flat))
                notes.append(f"Vanilla with {numbers} layers is no better than a shallower one.")
            if any(len(model.losses) == 1 for model in models.values()):
                notes.append(
                    "Some depths have one seed, so whether they differ significantly is not known."
                )
        refused = [row for row in self.rows if row.worth.refusal]
        return [*notes, *(f"{row.name} has no phi: {row.worth.refusal}." for row in refused)]

    def to_markdown(self) -> str:
        """Return table and notes in Markdown, without the title."""
        table = markdown_table(WORTH_HEADS, (row.cells for row in self.rows))
        return "\n\n".join([WORTH_EXPLANATION, table, bullets(self.notes)])

    def to_terminal(self) -> ResponsiveLayout:
        """Return the table for a terminal; narrow ones show fewer columns."""
        narrower: tuple[set[str], ...] = (set(), {"seeds"}, {"seeds", "loss", "NFE/layer"})
        return ResponsiveLayout(*map(self._table, narrower))

    def _table(self, left_out: Container[str]) -> Table:
        table = Table(title=WORTH_TITLE, title_justify="left", box=box.SIMPLE_HEAD)
        shown = [number for number, head in enumerate(WORTH_HEADS) if head not in left_out]
        for number in shown:
            justify: Literal["left", "right"] = "right" if number else "left"
            table.add_column(WORTH_HEADS[number], justify=justify, no_wrap=bool(number))
        for row in self.rows:
            table.add_row(*(row.cells[number] for number in shown))
        return table


def worth_section(
    results: Iterable[Trial], sweep_of: Mapping[str, str] | None = None
) -> WorthSection | None:
    """Return the section on finished trials, each seed separately.

    None if they hold no vanilla models of several depths, or no model with several evaluations
    per layer.

    Args:
        results: Of one sweep or several; one that several share counts once.
        sweep_of: Key of a result -> its sweep, for models of several sweeps with one name.
    """
    groups: dict[str, dict[str, list[Trial]]] = {}
    for trial in {result.key: result for result in results}.values():
        loss = trial.value("quality/validation_loss")
        if _is_from_scratch(trial) and loss is not None and math.isfinite(loss):
            models = groups.setdefault(_comparable_key(trial), {})
            models.setdefault(_model_key(trial), []).append(trial)
    vanilla = {
        group: {
            trials[0].model.num_layers: _measured(_best_rate(trials))
            for trials in models.values()
            if trials[0].method == BASELINE_METHOD
        }
        for group, models in groups.items()
    }
    found = [
        (group, _best_rate(trials))
        for group, models in groups.items()
        for trials in models.values()
        if trials[0].method != BASELINE_METHOD
    ]
    names = _names([trials[0] for _, trials in found], sweep_of or {})
    rows = []
    for (group, trials), name in zip(found, names, strict=True):
        model = _measured(trials)
        worth = correction_worth(model, list(vanilla[group].values()))
        rows.append(WorthRow(name=name, model=model, worth=worth))
    several = [models for models in vanilla.values() if len(models) > 1]
    if not several or all(row.model.evaluations_per_layer == 1 for row in rows):
        return None
    rows.sort(key=lambda row: (row.model.num_layers, row.model.evaluations_per_layer, row.name))
    return WorthSection(rows=tuple(rows), vanilla=tuple(several))


def _is_from_scratch(trial: Trial) -> bool:
    # A trial without a job is a pruned teacher; teachers and baselines may be given checkpoints.
    return trial.parent is None and (trial.job is not None or trial.role != "trial")


def _comparable_key(trial: Trial) -> str:
    """Return a hash of all that models need to have in common: shape but for depth, and tokens."""
    of_method = ("method", "method_options", "schedule", "num_layers")
    shape = {name: v for name, v in trial.model.to_dict().items() if name not in of_method}
    return content_key(shape, trial.suite.tokens, trial.train.tokens, trial.train.steps)


def _model_key(trial: Trial) -> str:
    """Return a hash of what makes a model but for its learning rate and seed."""
    if trial.method == BASELINE_METHOD:
        return content_key(trial.model.to_dict())
    free = {"learning_rate", "seed", *NON_KEY_FIELDS}
    recipe = trial.job.recipe.model_dump(mode="json", exclude=free) if trial.job else None
    return content_key(trial.model.to_dict(), recipe)


def _best_rate(trials: Sequence[Trial]) -> list[Trial]:
    """Return the seeds of one learning rate: that with the most seeds, then the lowest loss."""
    by_rate: dict[float | str, list[Trial]] = {}
    for trial in trials:
        # Of a checkpoint that a sweep was given, rate and seed are not recorded.
        rate = trial.job.recipe.learning_rate if trial.job else trial.key
        by_rate.setdefault(rate, []).append(trial)
    return min(by_rate.values(), key=lambda seeds: (-len(seeds), _measured(seeds).loss))


def _measured(seeds: Sequence[Trial]) -> MeasuredModel:
    config = seeds[0].model
    accuracies = [seed.value("quality/accuracy") for seed in seeds]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return MeasuredModel(
        num_layers=config.num_layers,
        evaluations_per_layer=sum(config.evaluations_per_layer()) / config.num_layers,
        losses=tuple(seed.quality["validation_loss"] for seed in seeds),
        accuracy=math.fsum(known) / len(known) if known else None,
    )


def _names(trials: Sequence[Trial], sweep_of: Mapping[str, str]) -> list[str]:
    """Return the models' labels without seeds; with the sweep where two have the same label."""
    names = [trial.group or trial.name for trial in trials]
    number = Counter(names)
    return [
        f"{name} ({sweep_of[trial.key]})" if number[name] > 1 and trial.key in sweep_of else name
        for name, trial in zip(names, trials, strict=True)
    ]


def _phi_text(worth: CorrectionWorth) -> str:
    """Return phi with its interval: `0.55 (0.31 to >1.00)`."""
    if worth.phi is None:
        return "none"
    if worth.interval is None:
        return f"{worth.phi:.2f}"
    low, high = worth.interval.low, worth.interval.high
    is_low_open, is_high_open = worth.is_open
    interval = f"{'<' * is_low_open}{low:.2f} to {'>' * is_high_open}{high:.2f}"
    return f"{worth.phi:.2f} ({interval})"
