"""`python examples/depth_study.py`: do corrections pay where a task needs depth and layers are few?

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
`results.json`; that of the published tables is `depth_study.json`. It takes hours on a CPU:

    python examples/depth_study.py --dry-run
    python examples/depth_study.py --hours 5
    python examples/depth_study.py --arms 'vanilla, ? layers' 'r = ?, 2 layers'
    python examples/depth_study.py --known examples/depth_study.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from depth_arms import Arm, Choices, select_arms, study_arms
from depth_figure import write_figure
from depth_results import (
    LOSS,
    ArmResult,
    CheckpointReadings,
    StudyResults,
    arm_result,
    copying_accuracy,
    rate_beyond,
    rate_of,
    rates_by_loss,
    read_checkpoint,
    seed_of,
)
from depth_tables import arm_line, study_markdown
from rich import box
from rich.table import Table

from orchestrator import (
    RunFailed,
    Settings,
    SweepModel,
    Trial,
    UserError,
    plan_sweep,
    prepare,
    read_settings,
    sweep,
)  # fmt: skip
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.cluster.start import ray_cluster
from orchestrator.data.sources import open_data
from orchestrator.pipelines.sweeps import PlannedSweep, raise_failures
from orchestrator.terminal.render import format_duration, print_line
from orchestrator.workspace.files import write_text
from orchestrator.workspace.provenance import content_key

SETTINGS = Path(__file__).with_suffix(".yaml")
ASSUMED_SPEED = 4e10
"""Training FLOPs per second of all trainings together, until a first one is measured."""


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
        "--hours", type=float, metavar="N", help="begin no arm that would end after N hours"
    )
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="a results.json whose arms are not run again"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args(arguments)
    changes = list(options.changes)
    if options.seeds:
        changes.append(f"sweep.seeds={options.seeds}")

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
                study.run(selected, hours=options.hours)
    except BaseException as error:
        return exit_code_of(error)
    return 0


class DepthStudy:
    """The arms in order, and what is known of them.

    Args:
        settings: `sweep.seeds` are the seeds, the first of them that of the learning rates.
        choices: Which arms there are.
        session: Workspace, progress and console.
        name: Prefix of the names of its sweeps, and of the folder of its results.

    Raises:
        UserError: If there are no seeds, or the data have no answers.
    """

    def __init__(
        self, settings: Settings, choices: Choices, session: Session, name: str = "depth"
    ) -> None:
        if not settings.sweep.seeds:
            raise UserError("sweep.seeds is empty; name seeds, such as --seeds 2 3 4")
        if settings.data.source != "depth":
            raise UserError(
                f"data.source is {settings.data.source}, and the study counts answers of depth "
                "tasks; leave it out, or set it to depth"
            )
        self.settings, self.choices, self.session, self.name = settings, choices, session, name
        self.arms = study_arms(settings, choices)
        self.seeds = settings.sweep.seeds
        self.folder = session.workspace.overlays / name
        stored = StudyResults.read_measured(self.folder / "results.json", session.progress.note)
        self.results = stored or StudyResults()
        self.failures: dict[str, str] = {}

    def take_over(self, path: Path) -> None:
        """Count an earlier `results.json`'s arms as finished where their settings are the same.

        Raises:
            UserError: If the file is missing or damaged.
        """
        found = StudyResults.read(path, remedy="name a results.json of this study")
        if found is None:
            raise UserError(f"--known: there is no file {path}; name a results.json of this study")
        self.results = self.results.model_copy(update={"arms": found.arms | self.results.arms})

    def run(self, selected: Sequence[Arm], *, hours: float | None = None) -> None:
        """Run the selected arms that are not finished, and write the results after each.

        Raises:
            RunFailed: If a trial failed, after all arms; the same command tries it again.
        """
        started, root = time.monotonic(), self.session.workspace.root
        self.tokens = prepare(
            self.settings, workspace=self.session.workspace, progress=self.session.progress
        )
        finished = {arm.name: found for arm in self.arms if (found := self._result(arm))}
        not_run = {
            arm.name: "not selected" if arm not in selected else "not run yet"
            for arm in self.arms
            if arm.name not in finished
        }
        self._write(finished, not_run)
        with ray_cluster(self.settings.cluster, folder=root, say=self.session.progress.start):
            for arm in (arm for arm in selected if arm.name not in finished):
                needed = self._most_hours(arm)
                left = None if hours is None else hours - (time.monotonic() - started) / 3600
                if left is not None and needed > left:
                    not_run[arm.name] = f"it takes {needed:.2f} hours, and {left:.2f} were left"
                elif result := self._run(arm):
                    finished[arm.name] = result
                    del not_run[arm.name]
                else:
                    not_run[arm.name] = "failed"
                self._write(finished, not_run)
        print_line(self.session.console, f"study: {self.folder / 'results.md'}")
        raise_failures(self.failures)

    def print_plan(self, selected: Sequence[Arm]) -> None:
        """Print what each arm takes from here on, as far as it is known."""
        table, total = Table(box=box.SIMPLE_HEAD), 0.0
        for head in ("arm", "trainings", "FLOPs", "time", "in all"):
            table.add_column(head, justify="left" if head == "arm" else "right")
        for arm in selected:
            if self._known(arm):
                table.add_row(arm.name, "known", "", "", format_duration(total))
                continue
            price = self._plan(self._expected_models(arm)).price
            seconds = price.flops / self.speed
            total += seconds
            row = [str(price.num_trainings), f"{price.flops:.1e}", format_duration(seconds)]
            table.add_row(arm.name, *(row if price.num_trainings else []), format_duration(total))
        self.session.console.print(table)
        measured = "measured" if self.results.seconds else "assumed"
        print_line(
            self.session.console,
            f"  at {measured} {self.speed:.1e} training FLOPs per second in all; a further "
            "learning rate, where the best one is the lowest or the highest, is not counted",
        )

    @property
    def speed(self) -> float:
        """Training FLOPs per second of all trainings together, evaluation and pauses included."""
        known = self.results
        return known.flops / known.seconds if known.flops and known.seconds else ASSUMED_SPEED

    def _run(self, arm: Arm) -> ArmResult | None:
        try:
            result = self._result(arm, may_train=True)
        except RunFailed as error:
            self.failures[arm.name] = str(error)
            return None
        if result:
            print_line(self.session.console, arm_line(result))
        return result

    def _result(self, arm: Arm, *, may_train: bool = False) -> ArmResult | None:
        """Return the result of an arm; None if something is not finished and may not be trained."""
        if known := self._known(arm):
            return known
        models = [arm.model(rate=rate, seed=self.seeds[0]) for rate in arm.rates]
        losses = self._first_losses(self._trials(models, f"{arm.slug}-rates", may_train=may_train))
        if losses and (more := rate_beyond(losses)):
            # A single training would get all CPUs, which slows it down where others use them. So
            # the other seeds train at the best rates so far; usually these stay the best.
            models = [arm.model(rate=more, seed=self.seeds[0]), *self._seeds_at(arm, losses)]
            trials = self._trials(models, f"{arm.slug}-further-rate", may_train=may_train)
            losses = losses | self._first_losses(trials) if trials else {}
        if not losses:
            return None
        models = self._seeds_at(arm, losses)
        trials = self._trials(models, f"{arm.slug}-seeds", may_train=may_train)
        if not trials:
            return None
        by_rate: dict[float, list[Trial]] = {}
        for trial in trials:
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
        models = [arm.model(rate=rate, seed=seed) for rate in arm.rates for seed in self.seeds]
        keys = [state.trial.key for state in self._plan(models).states]
        return content_key(keys, self.choices.num_rates)

    def _first_losses(self, trials: Sequence[Trial]) -> dict[float, float]:
        """Return learning rate -> validation loss at the first seed."""
        first = [trial for trial in trials if seed_of(trial) == self.seeds[0]]
        return {rate_of(trial): trial.numbers[LOSS] for trial in first}

    def _seeds_at(self, arm: Arm, losses: Mapping[float, float]) -> list[SweepModel]:
        """Return the models of all seeds at the best rates of the first seed."""
        rates = rates_by_loss(losses)[: self.choices.num_rates]
        return [arm.model(rate=rate, seed=seed) for rate in rates for seed in self.seeds]

    def _trials(
        self, models: Sequence[SweepModel], name: str, *, may_train: bool
    ) -> Sequence[Trial]:
        """Return the finished trials of some models; none if not all are finished."""
        plan = self._plan(models)
        known = [state.trial.result() for state in plan.states]
        finished = [trial for trial in known if trial]
        if len(finished) == len(known) or not may_train:
            return finished if len(finished) == len(known) else []
        started = time.monotonic()
        result = sweep(
            self.settings,
            workspace=self.session.workspace,
            models=models,
            name=f"{self.name}-{name}",
            progress=self.session.progress,
        )
        self.failures |= result.failures
        self.results = self.results.model_copy(
            update={
                "flops": self.results.flops + plan.price.flops,
                "seconds": self.results.seconds + time.monotonic() - started,
            }
        )
        return result.trials

    def _readings(self, trial: Trial) -> CheckpointReadings:
        path = self.folder / "readings" / f"{trial.key}.json"
        found = CheckpointReadings.read_measured(path, self.session.progress.note)
        if found is None:
            self.session.progress.start(f"reading {trial.name}")
            found = read_checkpoint(Path(str(trial.checkpoint)), open_data(self.tokens))
            found.write(path)
        return found

    def _plan(self, models: Sequence[SweepModel]) -> PlannedSweep:
        return plan_sweep(self.settings, workspace=self.session.workspace, models=models, name="s")

    def _expected_models(self, arm: Arm) -> list[SweepModel]:
        """Return the models of an arm if its best rate is a middle one."""
        models = [arm.model(rate=rate, seed=self.seeds[0]) for rate in arm.rates]
        likely = arm.rates[-1 - self.choices.num_rates : -1] or arm.rates
        return models + [arm.model(rate=r, seed=seed) for r in likely for seed in self.seeds[1:]]

    def _most_hours(self, arm: Arm) -> float:
        """Return what an arm takes from here on if a further learning rate is the best."""
        models = self._expected_models(arm)
        flops = self._plan(models).price.flops
        more = 1 + self.choices.num_rates * (len(self.seeds) - 1) if len(arm.rates) > 1 else 0
        return flops * (1 + more / len(models)) / self.speed / 3600

    def _write(self, finished: Mapping[str, ArmResult], not_run: Mapping[str, str]) -> None:
        arms = {arm.name: finished[arm.name] for arm in self.arms if arm.name in finished}
        self.results = self.results.model_copy(update={"arms": arms, "not_run": dict(not_run)})
        self.results.write(self.folder / "results.json")
        if not arms:
            return
        some = self._expected_models(self.arms[0])[:1]
        length = self._plan(some).states[0].trial.model.context_length
        copied = copying_accuracy(open_data(self.tokens), length)
        text = study_markdown(self.results, self.choices, self.settings, copied=copied)
        write_text(self.folder / "results.md", text)
        write_figure(self.results.arms, self.choices, self.folder / "accuracy")


if __name__ == "__main__":
    sys.exit(main())
