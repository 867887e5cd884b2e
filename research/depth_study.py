"""`python research/depth_study.py`: do corrections pay where a task needs depth and layers are few?

The study trains arms in the order of priority: vanilla models of several depths, IIETs with 0 and
more corrections, in two stages, with options; models that repeat the whole stack; PCformer. Each
arm takes two sweeps or three:

    rates           every learning rate of the arm at the first seed
    further rate    if the best one, by validation loss, is the lowest or the highest: one beyond it
    seeds           the two best rates under all seeds; the one with the lower mean loss counts

Then each checkpoint of that rate is read on validation sequences, as it was trained and under other
schedules. After each arm, `results.md`, `results.json` and a picture are written: verdicts by rules
that were fixed before (`depth_rules.py`), tables, and what a correction is worth in layers.

Nothing is trained twice: the same command resumes after an interruption, and another selection of
arms keeps what is finished. In another workspace `--known` takes over the finished arms of a
`results.json` that the same version has written. It takes hours on a CPU:

    python research/depth_study.py --dry-run
    python research/depth_study.py --arms 'vanilla, ? layers' 'r = ?, 2 layers'
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from depth_results import (
    LOSS,
    ArmResult,
    CheckpointReadings,
    StudyResults,
    accuracy_chart,
    arm_result,
    copying_accuracy,
    rate_beyond,
    rate_of,
    rates_by_loss,
    read_checkpoint,
    seed_of,
    study_markdown,
)
from depth_rules import Arm, Choices, select_arms, study_arms

from orchestrator import (
    RunFailed,
    Settings,
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
from orchestrator.data.mixture import open_data
from orchestrator.sweeping.plan import SweepPlan
from orchestrator.sweeping.sweep import raise_failures
from orchestrator.terminal.render import print_line
from orchestrator.workspace.files import write_text
from orchestrator.workspace.provenance import content_key

SETTINGS = Path(__file__).with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or print its plan; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder for all that is made")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of sweep.seeds")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="NAME", help="only these; * and ? stand for others"
    )
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="a results.json whose arms are not run again"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args(arguments)
    changes = [*options.changes, *([f"sweep.seeds={options.seeds}"] if options.seeds else [])]
    try:
        settings = read_settings(SETTINGS, changes)
        is_dry = options.dry_run
        with open_session(
            options.workspace, "depth-study", verbose=None, dry_run=is_dry
        ) as session:
            study = DepthStudy(settings, Choices(), session)
            if options.known:
                study.take_over(options.known)
            selected = select_arms(study.arms, options.arms)
            if is_dry:
                study.print_plan(selected)
            else:
                study.run(selected)
    except BaseException as error:
        return exit_code_of(error)
    return 0


class DepthStudy:
    """The arms in order, and what is known of them.

    Args:
        settings: `sweep.seeds` are the seeds, the first of them that of the learning rates.
        choices: Which arms there are.
        session: Workspace, progress and console.

    Raises:
        UserError: If there are no seeds, or the data have no answers.
    """

    def __init__(self, settings: Settings, choices: Choices, session: Session) -> None:
        if not settings.sweep.seeds:
            raise UserError("sweep.seeds is empty; name seeds, such as --seeds 2 3 4")
        if settings.data.source != "depth":
            raise UserError(
                f"data.source is {settings.data.source}, and the study counts answers of depth "
                "tasks; leave it out, or set it to depth"
            )
        self.settings = settings
        self.choices = choices
        self.session = session
        self.arms = study_arms(settings, choices)
        self.seeds = settings.sweep.seeds
        self.folder = session.workspace.overlays / "depth"
        stored = StudyResults.read(self.folder / "results.json")
        self.results = stored or StudyResults()

    def take_over(self, path: Path) -> None:
        """Count an earlier `results.json`'s arms as finished where their settings are the same.

        Raises:
            UserError: If the file is missing or damaged.
        """
        found = StudyResults.read(path)
        if found is None:
            raise UserError(f"--known: there is no file {path}; name a results.json of this study")
        self.results = self.results.model_copy(update={"arms": found.arms | self.results.arms})

    def print_plan(self, selected: Sequence[Arm]) -> None:
        """Print what each arm takes; a further learning rate is not counted."""
        for arm in selected:
            text = "known"
            if not self._known(arm):
                rates = arm.rates[: self.choices.num_rates]
                models = arm.models(arm.rates, self.seeds[:1])
                models |= arm.models(rates, self.seeds[1:])
                price = self._plan(models).price
                text = f"{price.num_trainings} trainings, {price.flops:.1e} FLOPs"
            print_line(self.session.console, f"  {arm.name}: {text}")

    def run(self, selected: Sequence[Arm]) -> None:
        """Run the selected arms that are not finished, and write the results after each.

        Raises:
            RunFailed: If a trial failed, after all arms; the same command tries it again.
        """
        session = self.session
        failures = dict[str, str]()
        known = {arm.name: found for arm in self.arms if (found := self._known(arm))}
        self.tokens = prepare(self.settings, workspace=session.workspace, progress=session.progress)
        with ray_cluster(
            self.settings.cluster, folder=session.workspace.root, say=session.progress.start
        ):
            for arm in selected:
                try:
                    known[arm.name] = self._result(arm)
                except RunFailed as error:
                    failures[arm.name] = str(error)
                if known:
                    self._write(known, failures)
        print_line(session.console, f"study: {self.folder / 'results.md'}")
        raise_failures(failures)

    def _result(self, arm: Arm) -> ArmResult:
        """Train what an arm still lacks, and return its result."""
        if known := self._known(arm):
            return known
        models = arm.models(arm.rates, self.seeds[:1])
        losses = self._first_losses(self._trials(models, f"{arm.slug}-rates"))
        if more := rate_beyond(losses):
            # A single training would get all CPUs, which slows it down where others use them. So
            # the other seeds train at the best rates so far; usually these stay the best.
            models = arm.models([more], self.seeds[:1]) | self._seeds_at(arm, losses)
            losses |= self._first_losses(self._trials(models, f"{arm.slug}-further-rate"))
        by_rate: dict[float, list[Trial]] = {}
        for trial in self._trials(self._seeds_at(arm, losses), f"{arm.slug}-seeds"):
            by_rate.setdefault(rate_of(trial), []).append(trial)
        means = {
            rate: statistics.fmean(trial.numbers[LOSS] for trial in seeds)
            for rate, seeds in by_rate.items()
        }
        best = by_rate[rates_by_loss(means)[0]]
        readings = {trial.key: self._readings(trial) for trial in best}
        return arm_result(arm, self._key(arm), best, losses, means, readings)

    def _known(self, arm: Arm) -> ArmResult | None:
        """Return a stored result if its settings are still those of the arm."""
        found = self.results.arms.get(arm.name)
        return found if found and found.key == self._key(arm) else None

    def _key(self, arm: Arm) -> str:
        models = arm.models(arm.rates, self.seeds)
        keys = [state.trial.key for state in self._plan(models).states]
        return content_key(keys, self.choices.num_rates)

    def _first_losses(self, trials: Sequence[Trial]) -> dict[float, float]:
        """Return learning rate -> validation loss at the first seed."""
        first = [trial for trial in trials if seed_of(trial) == self.seeds[0]]
        return {rate_of(trial): trial.numbers[LOSS] for trial in first}

    def _seeds_at(self, arm: Arm, losses: Mapping[float, float]) -> dict[str, Settings]:
        """Return the models of all seeds at the best rates of the first seed."""
        rates = rates_by_loss(losses)[: self.choices.num_rates]
        return arm.models(rates, self.seeds)

    def _trials(self, models: Mapping[str, Settings], name: str) -> Sequence[Trial]:
        """Return the trials of some models, and train what is not finished."""
        finished = [state.trial.result() for state in self._plan(models).states]
        if all(finished):
            return [trial for trial in finished if trial]
        result = sweep(
            self.settings,
            workspace=self.session.workspace,
            models=models,
            name=f"depth-{name}",
            progress=self.session.progress,
        )
        raise_failures(result.failures)
        return result.trials

    def _plan(self, models: Mapping[str, Settings]) -> SweepPlan:
        return plan_sweep(self.settings, workspace=self.session.workspace, models=models, name="s")

    def _readings(self, trial: Trial) -> CheckpointReadings:
        path = self.folder / "readings" / f"{trial.key}.json"
        found = CheckpointReadings.read(path)
        if found is None:
            self.session.progress.start(f"reading {trial.name}")
            found = read_checkpoint(Path(str(trial.checkpoint)), open_data(self.tokens))
            found.write(path)
        return found

    def _write(self, known: Mapping[str, ArmResult], failures: Mapping[str, str]) -> None:
        arms = {arm.name: known[arm.name] for arm in self.arms if arm.name in known}
        not_run = {
            arm.name: "failed" if arm.name in failures else "not run yet"
            for arm in self.arms
            if arm.name not in arms
        }
        self.results = StudyResults(arms=arms, not_run=not_run)
        self.results.write(self.folder / "results.json")
        some = self.arms[0].models([1e-3], [0])
        length = self._plan(some).states[0].trial.model.context_length
        copied = copying_accuracy(open_data(self.tokens), length)
        text = study_markdown(self.results, self.choices, self.settings, copied=copied)
        write_text(self.folder / "results.md", text)
        accuracy_chart([*arms.values()]).save(self.folder / "accuracy.png", scale_factor=2)


if __name__ == "__main__":
    sys.exit(main())
