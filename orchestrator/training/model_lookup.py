"""What a workspace holds: the model that a command means, and the tokens it was trained on.

Commands that get no path look here. Everything is read from the folders themselves, so a workspace
that was copied or half deleted says what it still has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from iiet.influence import InfluenceTable
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG
from orchestrator.data.token_store import verify_tokens
from orchestrator.settings import InfluenceSettings
from orchestrator.training.checkpoint import (
    check_checkpoint,
    load_config,
    load_provenance,
    tokenizer_file,
    weights_key,
)
from orchestrator.training.checkpoint_lookup import (
    find_checkpoints,
    is_checkpoint,
    newest_checkpoint,
    newest_intact_checkpoint,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import INVALID_VALUE_ERRORS, expand_user, read_json, resolve_path
from orchestrator.workspace.folders import Workspace, is_valid_name
from orchestrator.workspace.provenance import file_key

MOST_RUNS_NAMED = 20
"""A message names no more runs than these."""


Warn = Callable[[str], None]


def resolve_teacher(workspace: Workspace, path: Path | None, warn: Warn | None = None) -> Path:
    """Return the checkpoint that the user means: see `find_model_folder`.

    Without a path: the newest IIET with corrections.

    Args:
        workspace: Where names are looked up.
        path: A checkpoint, or a run, whose newest checkpoint is meant.
        warn: Called where the newest checkpoint is damaged and an older one is used; without it
            that is an error. Only commands that leave nothing behind may take another model.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if path is None:
        return find_newest_teacher(workspace, warn)
    return resolve_checkpoint(find_model_folder(workspace, path), warn)


def resolve_model(workspace: Workspace, path: Path | None, warn: Warn | None = None) -> Path:
    """Return the checkpoint that the user means, of any method: see `find_model_folder`.

    Without a path: the newest IIET with corrections or imported model, else the newest of any other
    method.

    Args and Raises: as `resolve_teacher`.
    """
    if path is None:
        return (
            _newest(workspace, _may_be_teacher_or_imported, warn)
            or _newest(workspace, lambda _: True, warn)
            or find_newest_teacher(workspace, warn)
        )
    return resolve_checkpoint(find_model_folder(workspace, path), warn)


def find_model_folder(workspace: Workspace, path: Path, *, model_folders: bool = False) -> Path:
    """Return the folder that a user names: by its path, or as a name inside the workspace, such as
    `NAME` of a run, `runs/NAME` or `runs/NAME/step_00000100`.

    Args:
        workspace: Where names are looked up.
        path: As typed.
        model_folders: Whether a folder of transformers will do, too.

    Raises:
        UserError: If there is no such folder; names the runs that there are.
    """
    path = expand_user(path)
    places = [p for p in (path, workspace.root / path, workspace.runs / path) if p.exists()]
    for place in places:
        # A folder without a model must not hide a run: what was imported has its folder's name.
        has_model = is_checkpoint(place) or bool(find_checkpoints(place))
        if has_model or (model_folders and (place / CONFIG).is_file()):
            return place.resolve()
    if places:
        return places[0].resolve()
    runs = _newest_runs(workspace)
    names = ", ".join(sorted(run.name for run in runs[:MOST_RUNS_NAMED]))
    newest = "newest " if len(runs) > MOST_RUNS_NAMED else ""
    known = f"its {newest}runs are {names}" if runs else "it has no runs yet"
    raise UserError(
        f"there is no folder {path}, and nothing of that name in the workspace {workspace.root}; "
        f"{known}"
    )


def find_newest_teacher(workspace: Workspace, warn: Warn | None = None) -> Path:
    """Return the newest checkpoint of an IIET with corrections; see `resolve_teacher`.

    Raises:
        UserError: If the workspace has none, which says how to make one; or it is damaged.
    """
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
        + "; `iiet-orch pretrain` makes one, `iiet-orch quickstart` does the whole job, and a path "
        "or a run's name as argument takes another"
    )


def _newest(
    workspace: Workspace, may_be_meant: Callable[[Sequence[Path]], bool], warn: Warn | None
) -> Path | None:
    """Return the newest checkpoint of the newest run that may be meant; None if there is none.

    Raises:
        UserError: If all that may be meant are damaged, or the newest is and nobody is warned.
    """
    all_damage: list[str] = []
    for run in _newest_runs(workspace):
        checkpoint, damage = newest_intact_checkpoint(run)
        if (checkpoint or damage) and may_be_meant(
            [checkpoint] if checkpoint else find_checkpoints(run)
        ):
            all_damage += damage
            if checkpoint:
                if all_damage:
                    report_older(checkpoint, all_damage, warn)
                return checkpoint
    if all_damage:
        raise UserError(
            f"{workspace.root} has no checkpoint that is whole ({'; '.join(all_damage)}); "
            "`iiet-orch pretrain` makes one, and a path as argument takes another"
        )
    return None


def _newest_runs(workspace: Workspace) -> list[Path]:
    return sorted(run_folders(workspace), key=lambda run: run.stat().st_mtime, reverse=True)


def _may_be_teacher(checkpoints: Sequence[Path]) -> bool:
    """Whether they are an IIET's with corrections; without readable configuration they may be."""
    for folder in checkpoints:
        with suppress(UserError):
            return bool(load_config(folder).corrections.num_corrections)
    return True


def _may_be_teacher_or_imported(checkpoints: Sequence[Path]) -> bool:
    for folder in checkpoints:
        with suppress(UserError):
            return "imported" in load_provenance(folder) or _may_be_teacher([folder])
    return True


def tokens_folder_of(checkpoint: Path, workspace: Workspace) -> Path:
    """Return the folder of the tokens that a checkpoint was trained on; for an imported one, the
    newest that were made with its tokenizer.

    Raises:
        UserError: If they are not in this workspace, or not what was written.
    """
    provenance = load_provenance(checkpoint)
    if "imported" in provenance:
        return _tokens_by_tokenizer(tokenizer_file(checkpoint), workspace)
    fingerprint = provenance.get("tokens", "")
    folder = workspace.tokens / str(fingerprint)
    if not is_valid_name(fingerprint) or not folder.is_dir():
        raise UserError(
            f"the tokens that {checkpoint} was trained on ({fingerprint or 'unknown'}) are not in "
            f"{workspace.root}; run `iiet-orch prepare` with the same data settings"
        )
    verify_tokens(folder)
    return folder


def find_checkpoint_by_weights(workspace: Workspace, key: str) -> Path | None:
    """Return the checkpoint of the workspace's runs with these weights; None if it is not there."""
    for run in run_folders(workspace):
        for checkpoint in find_checkpoints(run):
            with suppress(UserError):  # A damaged record is not the one that is looked for.
                if key and weights_key(checkpoint) == key:
                    return checkpoint
    return None


def load_influence_table(checkpoint: Path, metric: str | None = None) -> InfluenceTable | None:
    """Return an influence table that lies beside a checkpoint, of its own schedule.

    Args:
        checkpoint: The model that was measured.
        metric: Which measure of influence; the usual one when unset.

    Returns:
        The table of that metric; where it is missing, the only other one. None if there is none
        to read, or if it could be one of several.
    """
    own = load_config(checkpoint).corrections
    tables: dict[str, InfluenceTable] = {}
    for path in sorted(checkpoint.glob("influence-*.json")):
        with suppress(*INVALID_VALUE_ERRORS):
            table = InfluenceTable.from_dict(read_json(path))
            if table.schedule == own:
                tables[table.metric] = table
    wanted = tables.get(metric or InfluenceSettings().metric)
    return wanted or (next(iter(tables.values())) if len(tables) == 1 else None)


def parse_schedule(text: str | None, checkpoint: Path) -> IterationSchedule | None:
    """Read the schedule that a user typed for a checkpoint; None stays None.

    Raises:
        UserError: If it is none for a model of so many layers.
    """
    if text is None:
        return None
    try:
        return IterationSchedule.parse(text, num_layers=load_config(checkpoint).num_layers)
    except ValueError as error:
        raise UserError(f"--schedule: {error}") from None


def _tokens_by_tokenizer(tokenizer: Path, workspace: Workspace) -> Path:
    wanted = file_key(tokenizer)
    files = [f for f in workspace.tokens.glob("*/tokenizer.json") if file_key(f) == wanted]
    if not files:
        raise UserError(
            f"{workspace.root} has no tokens of this model's tokenizer; "
            f"`iiet-orch prepare --set data.tokenizer={tokenizer}` makes them"
        )
    folder = max(files, key=lambda file: file.stat().st_mtime).parent
    verify_tokens(folder)
    return folder


def run_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of the workspace's runs."""
    return [path for path in workspace.runs.glob("*") if path.is_dir()]


def resolve_checkpoint(path: Path, warn: Callable[[str], None] | None = None) -> Path:
    """Return the checkpoint that a user means by a path: itself, or a run's newest one.

    Args:
        path: A checkpoint or a run.
        warn: Called where a run's newest checkpoint is damaged and an older one is used. Without
            it that is an error: an older checkpoint is another model.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = resolve_path(path)
    if is_checkpoint(path):
        check_checkpoint(path)
        return path
    newest, damage = newest_intact_checkpoint(path)
    if newest is None:
        if not damage and (path / CONFIG).is_file():
            raise UserError(
                f"{path} is a model folder and no checkpoint; `iiet-orch import` makes one of it"
            )
        found = f" ({damage[0]})" if damage else ""
        raise UserError(f"{path} holds no whole checkpoint{found}; `iiet-orch pretrain` makes one")
    if damage:
        report_older(newest, damage, warn)
    return newest


def report_older(
    checkpoint: Path, damage: Sequence[str], warn: Callable[[str], None] | None
) -> None:
    """Say that an older checkpoint stands in for damaged ones.

    Raises:
        UserError: If there is nobody to warn.
    """
    problems = "; ".join(damage)
    if warn is None:
        raise UserError(
            f"{problems}. The newest whole one is {checkpoint}, which is another model; give that "
            "path to use it, or restore the damaged one"
        )
    warn(f"{problems}; {checkpoint} is used instead")
