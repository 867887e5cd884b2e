"""`python research/iiad_study.py`: is IIET better than others, and does IIAD keep that for less?

A study is a series of sweeps in one workspace; each is planned from the results of the one before:

    rates     every method and iteration count at every learning rate, one seed; with `sweep.asha`
              worse rates stop early
    tokens    each at its best rate, several seeds: the comparison at equal tokens
    flops     each at its best rate, for as many steps as the same training FLOPs allow
    fronts    students of the best IIET with most corrections: a front for each measure of
              influence; for the first measure, also without distillation and with other selections

Nothing is trained twice: an interrupted study resumes, and a larger one starts from a smaller one.
The results are the sweeps' reports and `results.md` with one table per phase; `text.md` is such a
page with comments. On your own text and tasks:

    python research/iiad_study.py --set data.source=files --set 'data.files=[text/*.txt]' \\
        --set evaluation.suite=heldout,my_task

It takes hours on a CPU; the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from orchestrator import (
    Settings,
    SweepResult,
    Trial,
    UserError,
    plan_sweep,
    prepare,
    read_settings,
    sweep,
)  # fmt: skip
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.cluster.ray import ray_cluster
from orchestrator.models.labels import seed_label, trained_label
from orchestrator.records.metrics import stderr_name
from orchestrator.reporting.output import show
from orchestrator.reporting.results import model_results
from orchestrator.reporting.sections import markdown_table
from orchestrator.reporting.statistics import sum_of_means
from orchestrator.settings import BASELINE_METHOD
from orchestrator.sweeping.models import (
    SweptModels,
    check_models,
    check_sweep,
    has_counts,
    learning_rates,
    settings_of,
    swept_variants,
)
from orchestrator.sweeping.sweep import raise_failures
from orchestrator.terminal.render import format_with_error, print_line
from orchestrator.training.job import pretraining_job
from orchestrator.training.schedules import flops_per_token_by_step
from orchestrator.workspace.files import write_text

SETTINGS = Path(__file__).with_suffix(".yaml")
LOSS = "quality/validation_loss"
BITS = "quality/bits_per_byte"
ACCURACY = "quality/accuracy"
PAPER_KEPT, PAPER_SAVED = 0.994, 0.55
"""The paper's headline: share of the accuracy kept, share of the inference overhead saved."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is compared beside the methods and rates of section `sweep`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the comparison at equal tokens; later phases use the first seed's models."""
    metrics: tuple[str, ...] = ("cosine", "relative", "loss")
    """Measures of influence, one front each."""
    controls: tuple[str, ...] = ("cross_entropy", "pruned")
    """Controls of the distillation on the first metric's schedules."""
    selections: tuple[str, ...] = ("knapsack",)
    """Other ways to choose schedules by the first metric."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Results of the models trained from scratch."""

    by_rate: Mapping[str, Mapping[float, Trial]]
    """Model -> learning rate -> result, one seed; without rates that failed or stopped early."""
    tokens: Mapping[str, Trial]
    """Model -> result at its best rate and equal tokens, mean over seeds."""
    losses: Mapping[str, Mapping[int, float]]
    """Model -> seed -> validation loss at its best rate and equal tokens."""
    flops: Mapping[str, Trial]
    """Model -> result at its best rate and equal training FLOPs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or print its plan; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder for all that is made")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--seeds", type=int, nargs="+", default=Choices.seeds, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="print the first phase's plan")
    options = parser.parse_args(arguments)
    try:
        settings = read_settings(SETTINGS, options.changes)
        is_dry = options.dry_run
        with open_session(options.workspace, "iiad-study", verbose=None, dry_run=is_dry) as session:
            study = IiadStudy(settings, Choices(seeds=tuple(options.seeds)), session)
            if is_dry:
                study.print_plan()
            else:
                study.run()
    except BaseException as error:
        return exit_code_of(error)
    return 0


class IiadStudy:
    """The phases in order.

    Args:
        settings: Sections `sweep` and `training` say which models are compared.
        choices: What is compared beside them.
        session: Workspace, progress and console.

    Raises:
        UserError: If there is no IIET with corrections among the models, or the settings contradict
            each other.
    """

    def __init__(self, settings: Settings, choices: Choices, session: Session) -> None:
        settings = _with(settings, sweep={"kind": "iterations"})
        self.settings = settings
        self.choices = choices
        self.session = session
        check_sweep(settings)
        check_models(settings, SweptModels.of(settings))
        if len(set(choices.seeds)) < len(choices.seeds):
            raise UserError(f"--seeds: a seed is given twice in {list(choices.seeds)}")
        counts = [r for r in settings.sweep.iterations if isinstance(r, int) and r]
        correcting = [name for name in settings.sweep.methods if has_counts(name)]
        if not correcting or not counts:
            raise UserError(
                "a study needs an IIET with corrections: put iiet into sweep.methods and a number "
                "above 0 into sweep.iterations"
            )
        self.fullest = trained_label(correcting[0], max(counts))
        self.variants = {variant.name: variant for variant in swept_variants(settings)}
        self.failures: dict[str, str] = {}

    def print_plan(self) -> None:
        """Print the plan of the first phase; its results determine the later ones."""
        space = self.session.workspace
        models = self._models(self._all_rates(), seeds=self.choices.seeds[:1])
        plan = plan_sweep(self.settings, workspace=space, models=models, name="study-rates")
        show(plan, self.session.console)
        fronts = ", ".join(self._ways())
        print_line(self.session.console, f"  this is the first phase; the fronts will be: {fronts}")

    def run(self) -> None:
        """Run every phase that is not finished, and write the results.

        Raises:
            RunFailed: If a trial failed, after all phases that do not need it; the same command
                tries it again.
        """
        session = self.session
        self.tokens = prepare(self.settings, workspace=session.workspace, progress=session.progress)
        root = session.workspace.root
        path = session.workspace.overlays / "study" / "results.md"
        with ray_cluster(self.settings.cluster, folder=root, say=session.progress.start):
            phases = self._compare()
            if self.fullest not in phases.by_rate:  # Another one's students would not compare.
                raise_failures(self.failures)
            ways = self._distill(phases)
        write_text(path, study_markdown(phases, ways))
        print_line(session.console, f"study: {path}")
        raise_failures(self.failures)

    def _compare(self) -> Phases:
        """Run the phases that train from scratch."""
        first = self.choices.seeds[:1]
        seeds = self.choices.seeds
        tried = _by_label(self._sweep("rates", self._models(self._all_rates(), seeds=first)))
        by_rate: dict[str, dict[float, Trial]] = {}
        for name, rates in self._all_rates().items():
            for rate in rates:
                if trial := tried.get(f"{name}, rate {rate:g}"):  # Others failed.
                    by_rate.setdefault(name, {})[rate] = trial
        best = {name: (_best_rate(own),) for name, own in by_rate.items()}
        of_seeds = self._sweep("tokens", self._models(best, seeds=seeds))
        steps = self._steps_of_equal_flops(best)
        longer = self._sweep("flops", self._models(best, seeds=first, num_steps=steps))
        losses: dict[str, dict[int, float]] = {}
        for trial in of_seeds:
            if trial.seed is not None and LOSS in trial.numbers:
                losses.setdefault(_name(trial), {})[trial.seed] = trial.numbers[LOSS]
        return Phases(
            by_rate=by_rate,
            tokens={_name(trial): trial for trial in _by_label(of_seeds).values()},
            losses=losses,
            flops={_name(trial): trial for trial in _by_label(longer).values()},
        )

    def _distill(self, phases: Phases) -> dict[str, Sequence[Trial]]:
        """Run the fronts of the IIET with most corrections: way -> results."""
        best = {name: own[_best_rate(own)] for name, own in phases.by_rate.items()}
        teacher = best[self.fullest]
        baselines = tuple(
            str(best[name].checkpoint)
            for name in (BASELINE_METHOD, trained_label(teacher.method, 0))
            if name in best
        )
        return {
            way: self._show(
                way,
                sweep(
                    _with(own, sweep={"baseline_runs": baselines}),
                    workspace=self.session.workspace,
                    teacher=Path(str(teacher.checkpoint)),
                    name=f"study-{way.replace(' ', '-')}",
                    progress=self.session.progress,
                ),
            )
            for way, own in self._ways().items()
        }

    def _ways(self) -> dict[str, Settings]:
        """Return the settings of every front by name; that of the first metric comes first."""
        # All trials of these sweeps have the same learning rate, so none is stopped early.
        settings = _with(self.settings, sweep={"kind": "threshold", "asha": False})
        metrics = self.choices.metrics
        ways = {metric: _with(settings, influence={"metric": metric}) for metric in metrics}
        usual = ways[metrics[0]]
        for control in self.choices.controls:
            ways[control.replace("_", " ")] = _with(usual, distillation={"control": control})
        for selection in self.choices.selections:
            ways[selection] = _with(usual, sweep={"selection": selection})
        return ways

    def _all_rates(self) -> dict[str, Sequence[float]]:
        return {name: learning_rates(self.settings, own) for name, own in self.variants.items()}

    def _models(
        self,
        rates: Mapping[str, Sequence[float]],
        *,
        seeds: Sequence[int],
        num_steps: Mapping[str, int] | None = None,
    ) -> dict[str, Settings]:
        """Return the models of a phase by label: variants at rates, under seeds, for a number of
        steps."""
        models = {}
        for name, own in rates.items():
            steps = (num_steps or {}).get(name, self.settings.training.num_steps)
            for rate, seed in product(own, seeds):
                label = f"{name}, rate {rate:g}"
                if len(seeds) > 1:
                    label = seed_label(label, seed)
                recipe = {"learning_rate": rate, "seed": seed, "num_steps": steps}
                models[label] = self._settings(name, **recipe)
        return models

    def _settings(self, name: str, **recipe: float) -> Settings:
        return _with(settings_of(self.settings, self.variants[name]), training=recipe)

    def _steps_of_equal_flops(self, best: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """Return how many steps the costliest model's training FLOPs allow, by name."""
        steps = self.settings.training.num_steps
        flops = {}
        for name in best:
            settings = self._settings(name, seed=0)
            job = pretraining_job(settings, self.session.workspace, self.tokens)
            flops[name] = math.fsum(map(flops_per_token_by_step(job), range(steps))) / steps
        return {name: round(steps * max(flops.values()) / own) for name, own in flops.items()}

    def _sweep(self, phase: str, models: Mapping[str, Settings]) -> Sequence[Trial]:
        found = sweep(
            self.settings,
            workspace=self.session.workspace,
            models=models,
            name=f"study-{phase}",
            progress=self.session.progress,
        )
        return self._show(phase, found)

    def _show(self, phase: str, result: SweepResult) -> Sequence[Trial]:
        show(result, self.session.console)
        for label, reason in result.failures.items():
            self.failures[f"{label} of {phase}"] = reason
        return result.trials


def _with(settings: Settings, **sections: Mapping[str, object]) -> Settings:
    changed = {
        name: getattr(settings, name).model_copy(update=dict(changes))
        for name, changes in sections.items()
    }
    return settings.model_copy(update=changed)


def _by_label(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return the results by label, seeds averaged."""
    return {model.trial.label: model.trial for model in model_results(trials)}


def _name(trial: Trial) -> str:
    return (trial.group or trial.label).partition(", rate ")[0]


def _best_rate(tried: Mapping[float, Trial]) -> float:
    return min(tried, key=lambda rate: tried[rate].numbers[LOSS])


# The page. Losses are compared seed by seed: models of one seed read the same batches, and IIETs
# share their first stage, so differences vary far less than the losses. Accuracies are compared
# directly; the report of each sweep has paired intervals.


def study_markdown(phases: Phases, ways: Mapping[str, Sequence[Trial]]) -> str:
    """Return the whole study as Markdown; `ways` are the results of the fronts by name."""
    parts = [
        "# Study",
        "± is one standard error: over the items for models with one seed, over the items and the "
        "seeds together for models with several. Differences of losses are taken seed by seed, and "
        "their error is over the seeds.",
        "\n".join(f"- {sentence}" for sentence in _claims(phases, ways)),
        "## Learning rates (validation loss, one seed)",
        _rates(phases),
        "## Equal tokens, each at its best rate",
        _models(phases.tokens),
        "## Equal training FLOPs, one seed",
        _models(phases.flops),
        "## Students: validation loss by NFE",
        _pivot(ways, LOSS),
        "## Students: accuracy in percent by NFE",
        _pivot(ways, ACCURACY),
        "## Students: iteration schedules by NFE",
        _pivot(ways, None),
    ]
    return "\n\n".join(parts) + "\n"


def _cost(result: Trial) -> float:
    """Return the NFE of a measured model."""
    return result.numbers["cost/evaluations"]


def _claims(phases: Phases, ways: Mapping[str, Sequence[Trial]]) -> Iterator[str]:
    against = [(name, BASELINE_METHOD) for name in phases.tokens]
    against += [
        (name, trained_label(result.method, 0))
        for name, result in phases.tokens.items()
        if has_counts(result.method)
    ]
    for name, other in against:
        if other in phases.tokens and name != other:
            yield f"{name} against {other} at equal tokens: {_difference(phases, name, other)}"
    usual = next(iter(ways.values()))
    students = [r for r in usual if r.role == "trial"]
    teacher = next(r for r in usual if r.role == "teacher")
    least = len(teacher.schedule or ())
    overhead = _cost(teacher) - least
    within = [r for r in students if _cost(r) - least <= (1 - PAPER_SAVED) * overhead + 1e-9]
    if within and overhead and teacher.numbers[ACCURACY]:
        # By loss: the best of several accuracies on the same items would be biased upwards.
        best = min(within, key=lambda r: r.numbers[LOSS])
        share = best.numbers[ACCURACY] / teacher.numbers[ACCURACY]
        saved = 1 - (_cost(best) - least) / overhead
        yield (
            f"students with {PAPER_SAVED:.0%} less overhead: the one with the lowest loss, "
            f"{best.name}, saves {saved:.0%} of the corrections and keeps {share:.1%} of its "
            f"teacher's accuracy (the paper: {PAPER_KEPT:.1%}); loss {best.numbers[LOSS]:.3f} "
            f"against {teacher.numbers[LOSS]:.3f}"
        )


def _difference(phases: Phases, name: str, other: str) -> str:
    mine = phases.tokens[name]
    theirs = phases.tokens[other]
    loss = f"{mine.numbers[LOSS] - theirs.numbers[LOSS]:+.3f}"
    own, others = (phases.losses.get(each, {}) for each in (name, other))
    by_seed = [own[seed] - others[seed] for seed in own if seed in others]
    if len(by_seed) > 1:
        over_seeds = sum_of_means([by_seed])
        loss = f"{over_seeds.value:+.3f} ± {over_seeds.error:.3f}"
    accuracy = f"{100 * (mine.numbers[ACCURACY] - theirs.numbers[ACCURACY]):+.2f}"
    errors = [each.numbers.get(stderr_name(ACCURACY)) for each in (mine, theirs)]
    known = [error for error in errors if error is not None]
    if len(known) == len(errors):  # Assumed independent.
        accuracy += f" ± {100 * math.hypot(*known):.2f}"
    return f"loss {loss}, accuracy {accuracy} points"


def _rates(phases: Phases) -> str:
    rates = sorted({rate for own in phases.by_rate.values() for rate in own})
    rows = []
    for name, own in phases.by_rate.items():
        losses = {rate: f"{trial.numbers[LOSS]:.3f}" for rate, trial in own.items()}
        losses[_best_rate(own)] = f"**{losses[_best_rate(own)]}**"
        rows.append([name, *(losses.get(rate, "") for rate in rates)])
    return markdown_table(["model", *(f"{rate:g}" for rate in rates)], rows)


def _models(models: Mapping[str, Trial]) -> str:
    heads = (
        "model", "NFE", "training FLOPs", "tokens", "validation loss", "bits per byte",
        "accuracy %", "seeds",
    )  # fmt: skip
    rows = [
        [
            name,
            f"{_cost(trial):.0f}",
            f"{trial.value('train/flops') or 0:.2e}",
            f"{trial.value('train/tokens') or 0:,.0f}",
            *(_number(trial, quality) for quality in (LOSS, BITS, ACCURACY)),
            f"{trial.value('train/seeds') or 1:.0f}",
        ]
        for name, trial in models.items()
    ]
    return markdown_table(heads, rows)


def _pivot(ways: Mapping[str, Sequence[Trial]], quality: str | None) -> str:
    """Return one row per cost and one column per way: a number, or the schedule."""
    students = {
        way: {_cost(trial): trial for trial in trials if trial.role == "trial"}
        for way, trials in ways.items()
    }
    rows = []
    for cost in sorted({cost for own in students.values() for cost in own}, reverse=True):
        cells = [f"{cost:.0f}"]
        for own in students.values():
            trial = own.get(cost)
            text = trial.schedule_text if trial else ""
            cells.append(_number(trial, quality, with_errors=False) if trial and quality else text)
        rows.append(cells)
    if quality:
        teacher = next(trial for trial in next(iter(ways.values())) if trial.role == "teacher")
        empty = [""] * (len(students) - 1)
        rows.append(["the teacher", _number(teacher, quality), *empty])
    return markdown_table(["NFE", *students], rows)


def _number(trial: Trial, quality: str, *, with_errors: bool = True) -> str:
    value = trial.value(quality)
    if value is None:
        return ""
    error = trial.value(stderr_name(quality)) if with_errors else None
    return format_with_error(value, error, is_percent=quality == ACCURACY)


if __name__ == "__main__":
    sys.exit(main())
