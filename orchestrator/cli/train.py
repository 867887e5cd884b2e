"""Commands that make tokens and models, one or many: prepare, pretrain, distill, the sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.command import Call, Command, Setting
from orchestrator.cli.options import (
    ConfigOption,
    LocalOption,
    NameOption,
    SchedulesOption,
    TeacherArgument,
    complete_models,
    one_schedule,
    read_schedules,
    split_list,
)
from orchestrator.workspace.errors import UserError

if TYPE_CHECKING:
    from orchestrator.pipelines.result import Result

HERE = {"--address": "cluster.address", "--logger": "tracking.loggers"}
CLUSTER = {**HERE, "--wait-for-gpus": "cluster.wait_for_gpus"}
TRIALS = {
    "--seeds": "sweep.seeds",
    "--trials-at-once": "sweep.trials_at_once",
    "--workers-per-trial": "sweep.workers_per_trial",
    "--gpus-per-trial": "sweep.gpus_per_trial",
}


def _switch(name: str, key: str) -> dict[str, str | Setting]:
    """Return `--NAME`, and `--no-NAME` for files that switch it on; the help shows the first."""
    off = Setting(key, bool, lambda _: False, hidden=True)
    return {f"--{name}": key, f"--no-{name}": off}


@Command("quickstart", group="All steps", options=HERE, config=ConfigOption,
         config_default="demo", trains=True, plans=True)  # fmt: skip
def quickstart(call: Call) -> Result:
    """Run all steps on a CPU, from a generated task to the front, in minutes.

    With --config, run the sweep of that file, or of that name: `toy` reads text.

    Example: iiet-orch quickstart --workspace my-workspace
    """
    return _sweep(call)


def _files(values: dict[str, Any], options: dict[str, Any]) -> None:
    if values["files"]:
        options |= {"data.source": "files", "data.files": values["files"]}


@Command("prepare", group="Train", config=ConfigOption, adjust=_files)
def prepare(
    call: Call,
    files: Annotated[list[str] | None, typer.Argument()] = None,  # noqa: ARG001  # _files reads it
) -> Result:
    """Read a corpus, train or load its tokenizer, and write token shards.

    Example: iiet-orch prepare my-texts/ --set data.vocab_size=4096

    Args:
        files: Text, JSON lines, Parquet or folders (default: English texts of Python).
    """
    from orchestrator.pipelines import training

    folder = training.prepare(call.settings, **call.common)
    return call.answer({"tokens": str(folder)}, [f"tokens: {folder}"])


def _settings_to_continue(values: dict[str, Any], options: dict[str, Any]) -> str | None:
    if values["continue_"] is None:
        return None
    if values["config"] is not None:
        raise UserError("--continue takes the run's own settings; use it without --config")
    from orchestrator.models.lookup import find_run_folder
    from orchestrator.settings import SETTINGS_NAME
    from orchestrator.workspace.layout import locate_workspace

    path = find_run_folder(locate_workspace(values["workspace"]), values["continue_"])
    path = path / SETTINGS_NAME
    if not path.is_file():
        raise UserError(
            f"{path.parent} was not made by `iiet-orch pretrain`: it has no {path.name}"
        )
    # A continued run is not profiled because the finished one was.
    options.setdefault("training.profile_steps", 0)
    return str(path)


@Command(
    "pretrain",
    group="Train",
    options={
        "--gpus": "cluster.num_gpus",
        "--workers": "cluster.num_workers",
        "--preset": "model.preset",
        "--method": "model.method",
        "--schedule,-r": Setting("model.corrections", list[str], one_schedule),
        "--steps": "training.num_steps",
        "--seed": "training.seed",
        "--lr": "training.learning_rate",
        "--dtype": "training.precision",
        "--skip-bad-steps": "training.skip_bad_steps",
        "--profile": "training.profile_steps",
        "--storage": "cluster.storage",
        **CLUSTER,
    },
    config=ConfigOption,
    adjust=_settings_to_continue,
    trains=True,
    plans=True,
)
def pretrain(
    call: Call,
    continue_: Annotated[
        Path | None, typer.Option("--continue", metavar="RUN", autocompletion=complete_models)
    ] = None,
    name: NameOption = None,
    local: LocalOption = False,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0)] = None,
) -> Result:
    """Pretrain one model on GPUs or CPUs; an interrupted run resumes.

    Example: iiet-orch pretrain --preset tiny -r 2,2,1,1,1,1 --steps 500 --seed 1

    Args:
        continue_: Finished run, by path or name, to continue to more --steps (wsd or constant).
        mfu: Share of the peak FLOP/s that --dry-run assumes.
    """
    if mfu is not None and not call.dry_run:
        raise UserError("--mfu is an assumption of the plan; use it with --dry-run")
    from orchestrator.pipelines.training import plan_pretrain, run_pretrain

    plan = plan_pretrain(
        call.settings, continued=continue_, name=name, local=local, mfu=mfu, **call.common
    )
    return call.finish(plan, run_pretrain)


@Command(
    "distill",
    group="Train",
    options={
        "--control": "distillation.control",
        "--seed": "distillation.training.seed",
        "--lr": "distillation.training.learning_rate",
        "--dtype": "distillation.training.precision",
        "--profile": "distillation.training.profile_steps",
        **HERE,
    },
    config=ConfigOption,
    trains=True,
    plans=True,
)
def distill(
    call: Call,
    teacher: TeacherArgument = None,
    schedule: SchedulesOption = None,
    local: LocalOption = False,
) -> Result:
    """Distill a teacher into itself under cheaper iteration schedules (IIAD), a student each.

    Example: iiet-orch distill my-run -r 2,1,1,0,0,0 -r 1 --lr 5e-4

    Args:
        schedule: The student's corrections per layer: 1, or 2,1,1,0,0,0; repeated for several
            students.
    """
    if not schedule:
        raise UserError(
            "--schedule says how many corrections the student's layers make, such as --schedule 1 "
            "or --schedule 2,1,1,0,0,0"
        )
    from orchestrator.pipelines.training import plan_distill, run_distill

    plan = plan_distill(
        call.settings,
        schedules=schedule,
        teacher=call.imported(teacher),
        local=local,
        **call.common,
    )
    return call.finish(plan, run_distill)


@Command("sweep", group="Sweeps", options=CLUSTER, config=Annotated[str, typer.Argument(
    metavar="FILE", help="A YAML file, or the name of a shipped sweep."
)], config_default=..., trains=True, plans=True)  # fmt: skip
def sweep_file(call: Call) -> Result:
    """Run a whole sweep from its file, pretraining included.

    Example: iiet-orch sweep toy --set training.num_steps=300
    """
    return _sweep(call)


def _threshold_kind(_: dict[str, Any], options: dict[str, Any]) -> None:
    options["sweep.kind"] = "search" if "search.num_trials" in options else "threshold"


@Command(
    "sweep-threshold",
    group="Sweeps",
    options={
        "--schedules": "sweep.num_schedules",
        "--thresholds": "sweep.thresholds",
        "--budgets": "sweep.budgets",
        "--cost": "sweep.budget_unit",
        "--selection": "sweep.selection",
        "--search": Setting(
            "search.num_trials",
            help="Then search: try at most this many schedules with any count in any layer.",
        ),
        "--distilled-baselines": "sweep.distilled_baselines",
        **_switch("elastic", "sweep.elastic"),
        **_switch("compare", "sweep.compare"),
        "--metric": "influence.metric",
        "--control": "distillation.control",
        **TRIALS,
        **CLUSTER,
    },
    config=ConfigOption,
    adjust=_threshold_kind,
    trains=True,
    plans=True,
)
def sweep_threshold(call: Call, teacher: TeacherArgument = None, name: NameOption = None) -> Result:
    """Prune by influence, distill and evaluate each schedule, and show the front.

    With --search, Optuna then suggests schedules outside the threshold's family.

    Example: iiet-orch sweep-threshold my-run --schedules 7 --dry-run
    """
    return _sweep(call, teacher or "newest", name)


def _iterations_kind(_: dict[str, Any], options: dict[str, Any]) -> None:
    options["sweep.kind"] = "iterations"


def _rates_of_all(text: str) -> dict[str, Any]:
    from iiet.methods import METHODS

    return dict.fromkeys(METHODS, split_list(text))


@Command(
    "sweep-iterations",
    group="Sweeps",
    options={
        "--schedule,-r": Setting("sweep.iterations", list[str], read_schedules),
        "--methods": "sweep.methods",
        "--steps": "training.num_steps",
        "--rates": Setting(
            "sweep.learning_rates",
            str,
            _rates_of_all,
            "Peak learning rates of every model, with commas between: 1e-3,2e-3,4e-3.",
        ),
        **_switch("asha", "sweep.asha"),
        **TRIALS,
        **CLUSTER,
    },
    config=ConfigOption,
    adjust=_iterations_kind,
    trains=True,
    plans=True,
)
def sweep_iterations(call: Call, name: NameOption = None) -> Result:
    """Pretrain methods and iteration counts on the same tokens and show them on one front.

    Example: iiet-orch sweep-iterations --methods vanilla,iiet -r 0 -r 1 -r 3..0 --seeds 0,1
    """
    return _sweep(call, None, name)


def _sweep(call: Call, teacher: Path | str | None = None, name: str | None = None) -> Result:
    from orchestrator.pipelines.sweeps import plan_sweep, sweep

    function = plan_sweep if call.dry_run else sweep
    return function(call.settings, teacher=teacher, name=name, **call.common)
