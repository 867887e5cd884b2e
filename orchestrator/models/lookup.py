"""Find models in a workspace: by path, by name, or the newest one that a command can use."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from iiet.influence import InfluenceTable
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG
from orchestrator.models.folder import (
    check_checkpoint,
    is_checkpoint,
    load_config,
    load_provenance,
    newest_checkpoint,
    newest_intact_checkpoint,
    weights_key,
)
from orchestrator.models.hub_models import HUB_PREFIX, download_model, is_hub_name
from orchestrator.models.loading import EXPORTED, decoder_config, folder_kind
from orchestrator.records.record import Record, WorkspacePath
from orchestrator.settings import InfluenceSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import INVALID_VALUE_ERRORS, expand_user, read_json, resolve_path
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import Workspace, find_checkpoints

MAX_RUNS_NAMED = 20

Warn = Callable[[str], None]


class Picked(Record):
    """The model that `pick` chose last."""

    sweep: str
    checkpoint: WorkspacePath
    schedule: tuple[int, ...] | None
    """Iteration schedule; None for a method without corrections."""
    time: float
    """When it was picked, in seconds since 1970."""


def picked_model(workspace: Workspace, sweep: str | None = None) -> Picked | None:
    """Return the last pick: of this sweep, or one that is newer than all runs; None without one.

    Raises:
        UserError: If its file is damaged.
    """
    found = Picked.read(workspace.picked)
    if found is None or not Path(found.checkpoint).is_dir():
        return None
    if sweep is not None:
        return found if found.sweep == sweep else None
    is_newest = all(last_recorded(run) < found.time for run in run_folders(workspace))
    return found if is_newest else None


def resolve_teacher(
    workspace: Workspace, path: Path | str | None, warn: Warn | None = None
) -> Path:
    """Return the checkpoint that the user means; without a path the newest IIET with corrections.

    Args:
        workspace: Where names are looked up.
        path: A checkpoint, or a run: its newest checkpoint is used. See `find_model_folder`.
        warn: Called if the newest checkpoint is damaged and an older one is used. Without `warn`
            that is an error: only commands that store nothing may use another model.

    Raises:
        UserError: If there is no checkpoint, it is damaged, or it is a model of the hub, which is
            imported first.
    """
    if path is not None:
        if is_hub_name(path):
            raise UserError(
                f"{path} becomes a run of the workspace at first use, and a dry run writes nothing;"
                f" `iiet-orch import {path}` imports it"
            )
        return resolve_checkpoint(find_model_folder(workspace, Path(path)), warn)
    if found := _newest(workspace, _may_be_teacher, warn):
        return found
    others = [
        f"{run.name} ({load_config(checkpoint).method})"
        for run in _newest_runs(workspace)
        if (checkpoint := newest_checkpoint(run))
    ]
    raise UserError(
        f"{workspace.root} has no IIET checkpoint with corrections"
        + (f", only {', '.join(others)}" if others else "")
        + "; `iiet-orch pretrain` makes one, `iiet-orch quickstart` does the whole job, or give a "
        "path or the name of a run as argument"
    )


def resolve_model(workspace: Workspace, path: Path | str | None, warn: Warn | None = None) -> Path:
    """Return the checkpoint that the user means, of any method.

    Without a path: the newest imported model or IIET with corrections, else the newest model.
    Args and Raises: as `resolve_teacher`.
    """
    if path is None:
        found = _newest(workspace, _may_be_teacher_or_imported, warn)
        found = found or _newest(workspace, lambda _: True, warn)
        if found:
            return found
    return resolve_teacher(workspace, path, warn)


def find_model_folder(workspace: Workspace, path: Path, *, model_folders: bool = False) -> Path:
    """Return the folder that a user names.

    Args:
        workspace: Where relative paths are looked up after the working folder.
        path: As typed: a path, or a name in the workspace such as `NAME` of a run, `runs/NAME` or
            `runs/NAME/step_00000100`; or `hub:OWNER/NAME`, which is downloaded.
        model_folders: Whether a folder of transformers is accepted.

    Raises:
        UserError: If there is no such folder; names the runs of the workspace. Or if the hub does
            not give the model.
    """
    if is_hub_name(path):
        return download_model(path)
    path = expand_user(path)
    places = [p for p in (path, workspace.root / path, workspace.runs / path) if p.exists()]
    for place in places:
        # A folder without a model must not hide a run: an imported run has the name of its source.
        has_model = is_checkpoint(place) or bool(find_checkpoints(place))
        if has_model or (model_folders and (place / CONFIG).is_file()):
            return place.resolve()
    if places:
        if places[0].is_file():
            raise UserError(
                f"{path} is a file; if it is a GGUF file, `iiet-orch import {path}` makes a "
                "checkpoint of it"
            )
        return places[0].resolve()
    runs = _newest_runs(workspace)
    names = ", ".join(sorted(run.name for run in runs[:MAX_RUNS_NAMED]))
    newest = "newest " if len(runs) > MAX_RUNS_NAMED else ""
    known = f"its {newest}runs are {names}" if runs else "it has no runs yet"
    raise UserError(
        f"there is no folder {path}, and nothing of that name in the workspace {workspace.root}; "
        f"{known}{hub_hint(path)}"
    )


def hub_hint(path: Path) -> str:
    """Return the end of a sentence about a missing folder that may be a model of the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path), flags=re.ASCII):
        return ""
    return f". For a model of the Hugging Face hub write {HUB_PREFIX}{path}"


def find_run_folder(workspace: Workspace, path: Path) -> Path:
    """Return the folder of the run that a user names, also by one of its checkpoints.

    Raises:
        UserError: If there is no such folder; names the runs of the workspace.
    """
    folder = find_model_folder(workspace, path)
    return folder.parent if is_checkpoint(folder) else folder


def resolve_checkpoint(path: Path, warn: Warn | None = None) -> Path:
    """Return a checkpoint, or the newest one of a run; `warn` as in `resolve_teacher`.

    Raises:
        UserError: If there is no checkpoint, or it is damaged.
    """
    path = resolve_path(path)
    if is_checkpoint(path):
        check_checkpoint(path)
        return path
    newest, damage = newest_intact_checkpoint(path)
    if newest is None:
        if not damage and (path / CONFIG).is_file():
            raise UserError(
                f"{path} is a model folder, not a checkpoint; `iiet-orch import` makes one of it"
            )
        found = f" ({damage[0]})" if damage else ""
        raise UserError(f"{path} holds no intact checkpoint{found}; `iiet-orch pretrain` makes one")
    if damage:
        _report_older(newest, damage, warn)
    return newest


def run_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of the workspace's runs."""
    return [path for path in workspace.runs.glob("*") if path.is_dir()]


def find_checkpoint_by_weights(workspace: Workspace, key: str) -> Path | None:
    """Return the checkpoint of the workspace's runs with this weights key, if any."""
    for run in run_folders(workspace):
        for checkpoint in find_checkpoints(run):
            with suppress(UserError):  # Skip checkpoints with a damaged provenance.
                if key and weights_key(checkpoint) == key:
                    return checkpoint
    return None


def load_influence_table(
    checkpoint: Path, metric: str | None = None, warn: Warn | None = None
) -> InfluenceTable | None:
    """Return the influence table stored beside a checkpoint for its own schedule.

    It is the table of `metric` (default: that of the settings). Without it, it is the only other
    table; None if there are none or several. `warn` is called with a sentence for each damaged one.
    """
    own = load_config(checkpoint).corrections
    tables: dict[str, InfluenceTable] = {}
    for path in sorted(checkpoint.glob("influence-*.json")):
        try:
            table = InfluenceTable.from_dict(read_json(path) or {})
        except INVALID_VALUE_ERRORS:
            if warn:
                warn(f"{path} is damaged and is left out; `iiet-orch influence` measures it again")
            continue
        if table.schedule == own:
            tables[table.metric] = table
    wanted = tables.get(metric or InfluenceSettings().metric)
    return wanted or (next(iter(tables.values())) if len(tables) == 1 else None)


def parse_schedule(
    text: str | None, checkpoint: Path, option: str = "--schedule"
) -> IterationSchedule | None:
    """Parse the value of an option for a checkpoint or an exported folder; None stays None.

    Raises:
        UserError: If it is not valid for the model's method and number of layers.
    """
    if text is None:
        return None
    is_exported = folder_kind(checkpoint) == EXPORTED
    config = (decoder_config(checkpoint) if is_exported else None) or load_config(checkpoint)
    try:
        schedule = IterationSchedule.parse(text, num_layers=config.num_layers)
        config.evaluations_per_layer(schedule)  # Raises where the method makes no corrections.
    except ValueError as error:
        problem = str(error).removeprefix("invalid model config: ")
        raise UserError(f"{option}: {problem}") from None
    return schedule


def _newest(
    workspace: Workspace, may_be_meant: Callable[[Sequence[Path]], bool], warn: Warn | None
) -> Path | None:
    """Return the newest intact checkpoint of the newest run that `may_be_meant` accepts."""
    all_damage: list[str] = []
    for run in _newest_runs(workspace):
        checkpoint, damage = newest_intact_checkpoint(run)
        if (checkpoint or damage) and may_be_meant(
            [checkpoint] if checkpoint else find_checkpoints(run)
        ):
            all_damage += damage
            if checkpoint:
                if all_damage:
                    _report_older(checkpoint, all_damage, warn)
                return checkpoint
    if all_damage:
        raise UserError(
            f"{workspace.root} has no intact checkpoint ({'; '.join(all_damage)}); "
            "`iiet-orch pretrain` makes one, or give a path as argument"
        )
    return None


def _newest_runs(workspace: Workspace) -> list[Path]:
    return sorted(run_folders(workspace), key=last_recorded, reverse=True)


def _may_be_teacher(checkpoints: Sequence[Path]) -> bool:
    # Without a readable configuration the run may be the one that is meant.
    for folder in checkpoints:
        with suppress(UserError):
            config = load_config(folder)
            repeats_stack = METHODS[config.method].repeats_stack
            return bool(config.corrections.num_corrections) and not repeats_stack
    return True


def _may_be_teacher_or_imported(checkpoints: Sequence[Path]) -> bool:
    for folder in checkpoints:
        with suppress(UserError):
            return "imported" in load_provenance(folder) or _may_be_teacher([folder])
    return True


def _report_older(checkpoint: Path, damage: Sequence[str], warn: Warn | None) -> None:
    problems = "; ".join(damage)
    if warn is None:
        raise UserError(
            f"{problems}. The newest intact one is {checkpoint}, which is another model; give that "
            "path to use it, or restore the damaged one"
        )
    warn(f"{problems}; {checkpoint} is used instead")
