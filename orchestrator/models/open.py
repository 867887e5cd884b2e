"""Open the model that a user names: the one way from a name to a model.

A name is that of a run, a trial or a folder. The default is the newest of finished runs and picks,
which is announced. A damaged model is an error, and never replaced by another one.

A model is a checkpoint of this program, or a model folder from elsewhere: an export, a folder with
the paper's names of weights, or any model of transformers. Weights are read only for the decoder. A
decoder runs the models that `models.load` lists. transformers runs all others, which can be
evaluated; known looped models (`models.loops`) have a depth instead of an iteration schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule, ScheduleLike
from orchestrator.models.folder import (
    TOKENIZER,
    NoDecoder,
    decoder_config,
    is_checkpoint,
    load_config,
    model_files_key,
    read_config,
    resolve_checkpoint,
    text_files_key,
    tokenizer_file,
    weights_key,
)
from orchestrator.models.hub import download, is_hub_name
from orchestrator.models.labels import model_label, unique_labels
from orchestrator.models.lookup import (
    AcceptedFolders,
    find_folder,
    finished_runs,
    is_accepted,
    picked_model,
)
from orchestrator.models.loops import LOOPED_MODELS, Depth, LoopedModel
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.training import schedule_parameters
from orchestrator.records.trial import Trial
from orchestrator.settings import DEFAULT_METHOD
from orchestrator.terminal.render import shortest_schedule
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import Workspace, find_checkpoints
from orchestrator.workspace.provenance import file_key

if TYPE_CHECKING:
    import torch

    from iiet.decoder import Decoder

ASSUMED_CONTEXT_LENGTH = 2048
"""Context length for a model of transformers whose configuration has none."""

# A model


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model on disk, under one iteration schedule or at one depth."""

    path: Path
    """Its checkpoint, or its folder if it is from elsewhere."""
    is_external: bool
    """Whether `path` is a model folder from elsewhere, not a checkpoint of this project."""
    text_folder: Path
    """Folder of the tokenizer."""
    config: ModelConfig | None
    """Sizes, method and schedule; None if transformers runs the model."""
    why_no_decoder: str
    """Why only transformers can run the model, as a sentence; empty if a decoder can."""
    architecture: str
    """The name of the method, or transformers' name of the architecture."""
    context_length: int
    """The context length in tokens."""
    loops: LoopedModel | None
    """Depth and costs of a looped model that transformers runs; None for any other model."""
    depth: Depth | None
    """How often the loops run; None without `loops`."""
    schedule_in_checkpoint: IterationSchedule | None = None
    """The schedule relative to the stored model, if it leaves layers out; `config` has only the
    kept layers."""
    schedule_label: str = ""
    """`r=2,1` or `depth=4`, if the user chose the schedule or depth; empty if it is the model's
    own."""

    @property
    def label(self) -> str:
        """Name of its run or folder, and the schedule or depth if it is not the model's own."""
        return model_label(self.path, self.schedule_label)

    @property
    def schedule(self) -> IterationSchedule | None:
        """Its iteration schedule; None if transformers runs it."""
        return None if self.config is None else self.config.corrections

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Everything that scores depend on, as JSON values: weights, configuration, tokenizer."""
        # For transformers, everything is in the model's files, except a chosen depth.
        computation: Any = "transformers"
        if self.config is not None:
            computation = self.config.to_dict()
            if self.schedule_in_checkpoint is not None:
                computation = [computation, str(self.schedule_in_checkpoint)]
        elif self.loops and self.depth != self.loops.default_depth:
            computation = ["transformers", self.depth]
        if self.is_external:  # The tokenizer is one of the model's files.
            return (model_files_key(self.path), computation)
        tokenizer = self.text_folder / TOKENIZER
        text_keys = [file_key(tokenizer)] if tokenizer.is_file() else []
        if other_files := text_files_key(self.text_folder):
            text_keys.append(other_files)
        return (weights_key(self.path), computation, *text_keys)

    def with_schedule(self, schedule: ScheduleLike, option: str = "--schedule") -> OpenedModel:
        """Return the model under another iteration schedule, or at another depth of its loops.

        Args:
            option: The option that the user typed, for errors.

        Raises:
            UserError: If it does not fit the model.
        """
        if self.config is not None:
            try:
                parsed = IterationSchedule.parse(schedule, num_layers=self.config.num_layers)
                config = self.config.of_kept_layers(parsed)
            except ValueError as error:
                problem = str(error).removeprefix("invalid model config: ")
                raise UserError(f"{option}: {problem}; the model is {self.path}") from None
            return replace(
                self,
                config=config,
                schedule_in_checkpoint=parsed if parsed.left_out_layers else None,
                schedule_label=f"r={shortest_schedule(parsed.corrections)}",
            )
        if self.loops is None:
            raise UserError(
                f"{option} {schedule}: {self.path} is a {self.architecture} model, which has no "
                "iteration schedule"
            )
        depth = self.loops.parse(str(schedule))
        label = f"depth={','.join(map(str, depth))}"
        return replace(self, depth=depth, schedule_label=label)

    @property
    def num_evaluations(self) -> int | None:
        """Layer evaluations per token (NFE); None if only transformers knows the model."""
        if self.config is not None:
            return sum(self.config.evaluations_per_layer())
        return self.loops.layer_runs(self.depth) if self.loops and self.depth else None

    def looped(self) -> tuple[LoopedModel, Depth]:
        """Return `loops` and `depth` of a model that has them."""
        assert self.loops is not None, "only a looped model is asked for its loops"
        assert self.depth is not None, "a looped model has a depth"
        return self.loops, self.depth

    def parameters(self) -> dict[str, str]:
        """Return the parameters of a tracked run: method, and iteration schedule or depth."""
        if self.config is not None:
            return schedule_parameters(self.config)
        depth = {"depth": ",".join(map(str, self.depth))} if self.depth else {}
        return {"method": self.architecture, **depth}

    def check_reads_text(self) -> None:
        """Raise `UserError` if this is a checkpoint that was imported without a tokenizer."""
        if not self.is_external:
            tokenizer_file(self.text_folder)

    def tokenizer(self, *, trust_remote_code: bool = False) -> ModelTokenizer:
        """Load the model's tokenizer.

        Raises:
            UserError: If the model has none, or one that cannot be used.
        """
        return ModelTokenizer(self.text_folder, trust_remote_code=trust_remote_code)

    def decoder(
        self, dtype: torch.dtype | None = None, *, device: str = "cpu", frozen: bool = False
    ) -> Decoder:
        """Load the model.

        Args:
            dtype: Of the weights; float32 when unset.
            device: Device of the weights.
            frozen: As in `load_model`: without gradients, perhaps mapped from its file.

        Raises:
            UserError: If only transformers can run it, or its weights are missing or damaged.
        """
        from orchestrator.models.load import DTYPES, load_model  # Imports PyTorch.

        if self.config is None:
            raise UserError(self.why_no_decoder)
        return load_model(
            self.path,
            device=device,
            dtype=dtype or DTYPES["fp32"],
            schedule=self.schedule_in_checkpoint or self.config.schedule,
            frozen=frozen,
        )


# From a name to a model


def open_model(
    name: Path | str | None,
    workspace: Workspace | None = None,
    schedule: ScheduleLike | None = None,
    *,
    folders: AcceptedFolders = "any",
    needs_weights: bool = True,
    with_corrections: bool = False,
    note: Callable[[str], None] | None = None,
) -> OpenedModel:
    """Open the model that a user names.

    Args:
        name: A checkpoint, a run (its newest checkpoint), a trial of a sweep, or a model folder, by
            path or by its name in the workspace; or `hub:OWNER/NAME`, which is downloaded. If None,
            the newest of the finished runs and the last pick, which needs a workspace.
        workspace: Where names are looked up; None if `name` is a path.
        schedule: Iteration schedule or depth, instead of that of the trial or pick, or the model's
            own.
        folders: Which model folders are accepted beside checkpoints.
        needs_weights: Whether a model folder must hold weights; a plan needs none.
        with_corrections: Without a name, only consider runs of an IIET with corrections.
        note: Without a name, called with a sentence that says which model is used.

    Raises:
        UserError: If there is no model, it is damaged or not accepted, or the schedule does not
            fit it.
    """
    path, named_schedule = _find_model(
        name, workspace, folders=folders, with_corrections=with_corrections, note=note
    )
    is_external = not is_checkpoint(path)

    # A decoder runs it if there is a configuration, else transformers.
    values = read_config(path)
    config = None
    why_no_decoder = ""
    try:
        config = (
            decoder_config(path, needs_weights=needs_weights) if is_external else load_config(path)
        )
    except NoDecoder as error:
        why_no_decoder = str(error)
    architecture = config.method if config else str(values.get("model_type") or "unknown")
    loops = None
    if config is None and architecture in LOOPED_MODELS:
        loops = LOOPED_MODELS[architecture](values)

    # Models of text and pictures have the sizes of their text part in a section.
    text_values = values.get("text_config") or values
    context_length = (
        text_values.get("max_position_embeddings")
        or text_values.get("n_positions")
        or ASSUMED_CONTEXT_LENGTH
    )
    model = OpenedModel(
        path=path,
        is_external=is_external,
        text_folder=path,
        config=config,
        why_no_decoder=why_no_decoder,
        architecture=architecture,
        context_length=config.context_length if config else int(context_length),
        loops=loops,
        depth=loops.default_depth if loops else None,
    )
    if schedule is None:
        schedule = named_schedule
    return model if schedule is None else model.with_schedule(schedule)


def _find_model(
    name: Path | str | None,
    workspace: Workspace | None,
    *,
    folders: AcceptedFolders = "any",
    with_corrections: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[Path, str | None]:
    """Return the checkpoint or model folder that a user names, and the schedule of a pick or trial.

    Arguments and errors are those of `open_model`. None means the model's own schedule.
    """
    if name is None:
        assert workspace is not None, "the newest model is that of a workspace"
        return _newest_model(workspace, note, with_corrections=with_corrections)
    if is_hub_name(name):
        if folders == "any":
            return download(name), None
        raise UserError(
            f"{name} becomes a run of the workspace at first use, and a dry run writes nothing;"
            f" `iiet-orch import {name}` imports it"
        )
    if workspace is not None and (trial := _find_trial(workspace, Path(name))):
        return trial
    folder = find_folder(workspace, Path(name), folders)
    if not is_accepted(folder, folders):
        folder = resolve_checkpoint(folder)
    return folder, None


def _newest_model(
    workspace: Workspace, note: Callable[[str], None] | None, *, with_corrections: bool
) -> tuple[Path, str | None]:
    """Return the model of the newest finished run, or of a later pick, and the pick's schedule."""
    runs = sorted(finished_runs(workspace), key=last_recorded, reverse=True)
    picked = None if with_corrections else picked_model(workspace)
    skipped_runs: list[str] = []
    if with_corrections:
        # Skip newer runs of other models; the error names them if there is no other run.
        while runs:
            config = load_config(find_checkpoints(runs[0])[-1])
            if config.method == DEFAULT_METHOD and config.corrections.num_corrections:
                break
            skipped_runs.append(f"{runs.pop(0).name} ({config.method})")

    schedule = None
    if picked and (not runs or picked.time > last_recorded(runs[0])):
        folder = Path(picked.checkpoint)
        schedule = picked.schedule
        origin = f"that `pick` chose from the sweep {picked.sweep}"
    elif runs:
        folder = runs[0]
        origin = "of the newest run with corrections" if with_corrections else "of the newest run"
    else:
        missing = "no IIET checkpoint with corrections" if with_corrections else "no finished run"
        only = f", only {', '.join(skipped_runs)}" if skipped_runs else ""
        raise UserError(
            f"{workspace.root} has {missing}{only}; `iiet-orch pretrain` makes one, `iiet-orch "
            "quickstart` does the whole job, or give a path or the name of a run as argument"
        )
    checkpoint = resolve_checkpoint(folder)
    if note:
        note(f"the model is {checkpoint}, {origin}")
    return checkpoint, schedule


def _find_trial(workspace: Workspace, path: Path) -> tuple[Path, str | None] | None:
    """Return checkpoint and schedule of a measured trial by its name in `list`.

    The checkpoint may be in another folder, for example a teacher's that the trial measures under a
    schedule. None for any other name, and for an unmeasured trial, whose folder is found like that
    of any training.

    Raises:
        UserError: If its result is damaged.
    """
    trials: list[Trial] = []
    for folder in (workspace.trials / path, workspace.root / path):
        if folder.parent == workspace.trials and folder.is_dir():
            results = [Trial.read(file) for file in sorted(folder.glob("result-*.json"))]
            trials = [trial for trial in results if trial and trial.checkpoint]
            break
    if not trials:
        return None
    checkpoint = resolve_checkpoint(Path(str(trials[0].checkpoint)))
    schedules = {trial.opened_schedule for trial in trials}
    # Elastic weights may be measured under several schedules: then use the checkpoint's own.
    schedule = schedules.pop() if len(schedules) == 1 else None
    return checkpoint, schedule


def open_models(
    names: Sequence[Path | str],
    workspace: Workspace,
    schedules: Sequence[str] = (),
    *,
    note: Callable[[str], None] | None = None,
) -> list[OpenedModel]:
    """Open the models that a user names, each under each of the schedules; see `open_model`.

    Args:
        names: If empty, the newest of the finished runs and the last pick.
        schedules: Iteration schedules or depths; if empty, each model's own.
    """
    if names:
        models = [open_model(name, workspace) for name in names]
    else:
        models = [open_model(None, workspace, note=note)]
    if not schedules:
        return models
    return [model.with_schedule(schedule) for model in models for schedule in schedules]


def by_label(models: Sequence[OpenedModel]) -> dict[str, OpenedModel]:
    """Return models by the labels that they are shown with, each of which is unique.

    For one model under several schedules, the labels are the schedules.
    """
    schedules = {model.schedule for model in models if model.schedule is not None}
    is_one_model = len({model.path for model in models}) == 1
    if len(models) > 1 and is_one_model and len(schedules) == len(models):
        labels = [f"r={shortest_schedule(tuple(model.schedule or ()))}" for model in models]
    else:
        labels = unique_labels([(model.path, model.schedule_label) for model in models])
    return dict(zip(labels, models, strict=True))
