"""`python examples/iiad_study.py`: is IIET better than others, and does IIAD keep that for less?

A study is a series of sweeps in one workspace; each is planned from the results of the one before:

    rates     every method and iteration count at every learning rate, one seed; with `sweep.asha`
              worse rates stop early
    tokens    each at its best rate, several seeds: the comparison at equal tokens
    flops     each at its best rate, for as many steps as the same training FLOPs allow
    fronts    students of the best IIET with most corrections: a front for each measure of
              influence; for the first measure, also without distillation and with other selections

Nothing is trained twice: an interrupted study resumes, and a larger one starts from a smaller one.
The results are the sweeps' reports, two pictures that compare the fronts, and `results.md` with one
table per phase; docs/results.md is such a page with comments. On your own text and tasks:

    python examples/iiad_study.py --set data.source=files --set 'data.files=[text/*.txt]' \\
        --set evaluation.suite=heldout,my_task

It takes hours on a CPU; the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from study_tables import Phases, Ways, losses_by_seed, study_markdown

from iiet.methods import METHODS
from orchestrator import (
    Settings,
    SweepModel,
    SweepResult,
    Trial,
    UserError,
    plan_sweep,
    prepare,
    read_settings,
    report,
    sweep,
)  # fmt: skip
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.cluster.start import ray_cluster
from orchestrator.data.preparation import find_prepared
from orchestrator.pipelines.result import show
from orchestrator.pipelines.sweeps import raise_failures
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.results import result_table
from orchestrator.settings import BASELINE_METHOD
from orchestrator.sweeping.checks import check_models, check_sweep
from orchestrator.sweeping.model_plans import learning_rates, model_label, settings_of, swept_models
from orchestrator.sweeping.trials import check_student_batch
from orchestrator.terminal.render import format_count, print_line
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.training.schedules import flops_per_token_by_step
from orchestrator.workspace.files import write_text

SETTINGS = Path(__file__).with_suffix(".yaml")
TWO_STAGES = ", two stages"
LOSS = "quality/validation_loss"
_BY_CHOICE = ("cosine", "relative", "loss", "knapsack")
"""Fronts that differ in which schedules they hold; the others differ in how those are trained."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is compared beside the methods and rates of section `sweep`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the comparison at equal tokens; later phases use the first seed's models."""
    two_stage_from: float | None = None
    """Also train the IIET with most corrections in two stages, with corrections after this share of
    the steps; the better of the two is the teacher."""
    equal_flops: bool = True
    """Also train each model for as many steps as the costliest model's training FLOPs allow."""
    metrics: tuple[str, ...] = ("cosine", "relative", "loss")
    """Measures of influence, one front each."""
    controls: tuple[str, ...] = ("cross_entropy", "pruned")
    """Controls of the distillation on the first metric's schedules."""
    selections: tuple[str, ...] = ("knapsack",)
    """Other ways to choose schedules by the first metric."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or print its plan; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder for all that is made")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--seeds", type=int, nargs="+", default=Choices.seeds, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args(arguments)
    choices = Choices(seeds=tuple(options.seeds))

    try:
        settings = read_settings(SETTINGS, options.changes)
        is_dry = options.dry_run
        with open_session(options.workspace, "iiad-study", verbose=None, dry_run=is_dry) as session:
            run_study(settings, choices, session, dry_run=is_dry)
    except BaseException as error:
        return exit_code_of(error)
    return 0


def run_study(
    settings: Settings,
    choices: Choices,
    session: Session,
    *,
    name: str = "study",
    dry_run: bool = False,
) -> None:
    """Run every phase that is not finished, and write the results.

    Args:
        settings: Sections `sweep` and `training` say which models are compared.
        choices: What is compared beside them.
        session: Workspace, progress and console.
        name: Prefix of the names of its sweeps.
        dry_run: Print the first phase's plan and what follows it; run nothing.

    Raises:
        UserError: If there is no IIET with corrections among the models.
        RunFailed: If a trial failed, after all phases that do not need it; the same command tries
            it again.
    """
    settings = _with(settings, sweep={"kind": "iterations"})
    _check(settings, choices, session, dry_run=dry_run)
    if dry_run:
        tokens = find_prepared(settings.data, session.workspace.tokens)
    else:
        tokens = prepare(settings, workspace=session.workspace, progress=session.progress)
    study = _Study(settings, choices, session, name, tokens=tokens)
    if dry_run:
        plan = plan_sweep(
            settings,
            workspace=session.workspace,
            models=study.models(study.all_rates(), seeds=choices.seeds[:1]),
            name=f"{name}-rates",
            progress=session.progress,
        )
        show(plan, session.console)
        print_line(session.console, _later_phases(settings, choices, len(study.contenders)))
        return
    root = session.workspace.root
    with ray_cluster(settings.cluster, folder=root, say=session.progress.start):
        phases = study.compare()
        ways = study.distill(phases)
    folder = session.workspace.overlays / name
    overlays = [
        report(workspace=session.workspace, sweeps=names, quality="loss")
        for names in (ways.schedule_sweeps, ways.training_sweeps)
        if len(names) > 1
    ]
    text = study_markdown(phases, ways, [overlay.folder for overlay in overlays])
    write_text(folder / "results.md", text)
    print_line(session.console, f"study: {folder / 'results.md'}")
    raise_failures(study.failures)


def _check(settings: Settings, choices: Choices, session: Session, *, dry_run: bool) -> None:
    check_sweep(settings, None if dry_run else session.progress)
    check_models(settings)
    for own in _ways(settings, choices).values():
        check_sweep(own)
    if len(set(choices.seeds)) < len(choices.seeds):
        raise UserError(f"--seeds: the same seed twice in {list(choices.seeds)}; name each once")
    start, ramp = choices.two_stage_from, settings.training.iterate_ramp_fraction
    if start and start + ramp > 1.0 + 1e-9:
        raise UserError(
            f"two_stage_from={start} and training.iterate_ramp_fraction={ramp} add up to more "
            "than 1, so the training would end before all corrections are used; lower one"
        )


@dataclass(frozen=True)
class _Contender:
    """One method or iteration count, and its training apart from the learning rate."""

    name: str
    settings: Settings
    rates: tuple[float, ...]

    def at(self, *, rate: float, seed: int, num_steps: int | None = None) -> Settings:
        recipe = self.settings.training
        changes = {"learning_rate": rate, "seed": seed, "num_steps": num_steps or recipe.num_steps}
        training = recipe.model_copy(update=changes)
        return self.settings.model_copy(update={"training": training})


class _Study:
    """The phases in order."""

    def __init__(
        self,
        settings: Settings,
        choices: Choices,
        session: Session,
        name: str,
        *,
        tokens: Path | None = None,
    ) -> None:
        self.settings, self.choices, self.session, self.name = settings, choices, session, name
        self.failures: dict[str, str] = {}
        self.contenders = {c.name: c for c in _contenders(settings, choices.two_stage_from)}
        self.tokens = tokens
        first = next(iter(self.contenders.values()))
        config = self._job(first.at(rate=1.0, seed=0)).model
        check_student_batch(settings.distillation, config)

    def all_rates(self) -> dict[str, Sequence[float]]:
        return {name: contender.rates for name, contender in self.contenders.items()}

    def models(
        self,
        rates: Mapping[str, Sequence[float]],
        *,
        seeds: Sequence[int],
        num_steps: Mapping[str, int] | None = None,
    ) -> list[SweepModel]:
        """Return the models of a phase: contenders at rates, under seeds, for a number of steps."""
        found = []
        for name, own in rates.items():
            steps = (num_steps or {}).get(name)
            for rate, seed in product(own, seeds):
                settings = self.contenders[name].at(rate=rate, seed=seed, num_steps=steps)
                label = _label(name, rate, own)
                if len(seeds) == 1:
                    found.append(SweepModel(label=label, settings=settings))
                else:
                    seeded = f"{label}, seed {seed}"
                    found.append(SweepModel(label=seeded, settings=settings, group=label))
        return found

    def compare(self) -> Phases:
        """Run the phases that train from scratch."""
        first, seeds = self.choices.seeds[:1], self.choices.seeds
        tried = _joined(self._run("rates", self.models(self.all_rates(), seeds=first)))
        by_rate: dict[str, dict[float, Trial]] = {}
        for name, own in self.all_rates().items():
            for rate in own:
                if (label := _label(name, rate, own)) in tried:  # Others failed.
                    by_rate.setdefault(name, {})[rate] = tried[label]
        best = {name: _best_rate(own) for name, own in by_rate.items()}
        chosen: dict[str, Sequence[float]] = {name: (rate,) for name, rate in best.items()}
        of_seeds = self._run("tokens", self.models(chosen, seeds=seeds))
        flops: Mapping[str, Trial] = {}
        if self.choices.equal_flops:
            steps = self._steps_of_equal_flops()
            flops = _joined(self._run("flops", self.models(chosen, seeds=first, num_steps=steps)))
        at_best = {name: by_rate[name][rate] for name, rate in best.items()}
        return Phases(
            by_rate=by_rate,
            best=at_best,
            tokens=_joined(of_seeds),
            losses=losses_by_seed(of_seeds),
            flops=flops,
        )

    def distill(self, phases: Phases) -> Ways:
        """Run the fronts of the best IIET with most corrections."""
        most = max(sum(result.schedule or ()) for result in phases.best.values())
        wanted = max(
            self._job(contender.at(rate=1.0, seed=0)).model.corrections.num_corrections
            for contender in self.contenders.values()
        )
        if most < wanted:  # The teacher failed; another one's students would not compare.
            raise_failures(self.failures)
        fullest = [r for r in phases.best.values() if sum(r.schedule or ()) == most]
        teacher = min(fullest, key=lambda result: result.numbers[LOSS])
        baselines = {
            name: Path(str(phases.best[name].checkpoint))
            for name in (BASELINE_METHOD, model_label(teacher.method, 0))
            if name in phases.best
        }
        ways = _ways(self.settings, self.choices)
        found = {}
        for way, own in ways.items():
            result = sweep(
                own,
                workspace=self.session.workspace,
                teacher=Path(str(teacher.checkpoint)),
                baselines=baselines,
                name=self._sweep_name(way),
                progress=self.session.progress,
            )
            self._print(way, result)
            found[way] = result.trials
        usual, *others = ways
        choosing = [usual, *(way for way in others if way in _BY_CHOICE)]
        training = [usual, *(way for way in others if way not in _BY_CHOICE)]
        return Ways(
            teacher=teacher,
            results=found,
            schedule_sweeps=[self._sweep_name(way) for way in choosing],
            training_sweeps=[self._sweep_name(way) for way in training],
        )

    def _sweep_name(self, phase: str) -> str:
        return f"{self.name}-{phase.replace(' ', '-')}"

    def _run(self, phase: str, models: Sequence[SweepModel]) -> Sequence[Trial]:
        result = sweep(
            self.settings,
            workspace=self.session.workspace,
            models=models,
            name=self._sweep_name(phase),
            progress=self.session.progress,
        )
        self._print(phase, result)
        return result.trials

    def _print(self, phase: str, result: SweepResult) -> None:
        show(result, self.session.console)
        for label, reason in result.failures.items():
            self.failures[f"{label} of {phase}"] = reason

    def _steps_of_equal_flops(self) -> dict[str, int]:
        """Return how many steps the costliest contender's training FLOPs allow, by name."""
        steps = self.settings.training.num_steps
        flops = {name: self._flops_per_token(name) for name in self.contenders}
        return {name: round(steps * max(flops.values()) / own) for name, own in flops.items()}

    def _flops_per_token(self, name: str) -> float:
        """Return the mean over the steps, stages and ramp included."""
        job = self._job(self.contenders[name].at(rate=1.0, seed=0))
        num_steps, flops_at = job.recipe.num_steps, flops_per_token_by_step(job)
        return math.fsum(map(flops_at, range(num_steps))) / num_steps

    def _job(self, settings: Settings) -> TrainingJob:
        return pretraining_job(settings, self.session.workspace, self.tokens)


def _joined(results: Sequence[Trial]) -> dict[str, Trial]:
    return {result.label: result for result in result_table(results)["trial"]}


def _label(name: str, rate: float, rates: Sequence[float]) -> str:
    return name if len(rates) == 1 else f"{name}, rate {rate:g}"


def _best_rate(tried: Mapping[float, Trial]) -> float:
    return min(tried, key=lambda rate: tried[rate].numbers[LOSS])


def _contenders(settings: Settings, two_stage_from: float | None) -> Iterable[_Contender]:
    models = []
    for model in swept_models(settings):
        rates = learning_rates(settings, model)
        models.append(_Contender(model.name, settings_of(settings, model), rates))
    yield from models
    counts = [count for count in settings.sweep.iterations if isinstance(count, int) and count]
    correcting = [name for name in settings.sweep.methods if METHODS[name].has_corrections]
    if not correcting or not counts:
        raise UserError(
            "a study needs an IIET with corrections: put iiet into sweep.methods and a number "
            "above 0 into sweep.iterations"
        )
    if two_stage_from:
        label = model_label(correcting[0], max(counts))
        full = next(model for model in models if model.name == label)
        recipe = full.settings.training.model_copy(update={"iterate_from_fraction": two_stage_from})
        two_stage = full.settings.model_copy(update={"training": recipe})
        yield _Contender(full.name + TWO_STAGES, two_stage, full.rates)


def _later_phases(settings: Settings, choices: Choices, num_models: int) -> str:
    """Say what follows the learning rates; their results determine the later trials."""
    recipe, ways = settings.distillation.training, list(_ways(settings, choices))
    num_tokens = recipe.num_steps * recipe.num_tokens_per_step
    models, seeds = format_count(num_models, "model"), format_count(len(choices.seeds), "seed")
    phases = [f"{models} at the best rate under {seeds}"]
    if choices.equal_flops:
        phases.append(f"{models} for equal training FLOPs")
    phases.append(
        f"{format_count(len(ways), 'front')} ({', '.join(ways)}) of up to "
        f"{format_count(settings.sweep.num_schedules, 'student')}, each on {num_tokens:,} tokens"
    )
    return f"  this is the first phase; then {'; then '.join(phases)}"


def _ways(settings: Settings, choices: Choices) -> dict[str, Settings]:
    """Return the settings of every front by name; that of the first metric comes first."""
    # All trials of these sweeps have the same learning rate, so none is stopped early.
    settings = _with(settings, sweep={"kind": "threshold", "asha": False})
    ways: dict[str, Settings] = {
        metric: _with(settings, influence={"metric": metric}) for metric in choices.metrics
    }
    usual = next(iter(ways.values()))
    for control in choices.controls:
        ways[control.replace("_", " ")] = _with(usual, distillation={"control": control})
    for selection in choices.selections:
        ways[selection] = _with(usual, sweep={"selection": selection})
    return ways


def _with(settings: Settings, **sections: Mapping[str, object]) -> Settings:
    return settings.model_copy(
        update={
            name: getattr(settings, name).model_copy(update=dict(changes))
            for name, changes in sections.items()
        }
    )


if __name__ == "__main__":
    sys.exit(main())
