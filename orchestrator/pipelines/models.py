"""Import models from elsewhere; export and pick models of the workspace.

An import makes a checkpoint, with the model's special tokens and chat template, but without an
optimizer state to resume from. An export is a folder that transformers and lm-eval load without
this package: weights, tokenizer, the model's code, and a card with the quality of these weights
under this schedule. `MANIFEST.sha256` lists its files for `sha256sum --check`; a folder with other
or changed files is never overwritten. Modules that import lm-eval or MLflow are imported where they
are used, because `generate` imports this file.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from iiet.cost import num_parameters
from iiet.hf.plain_models import MODEL_TYPES, is_plain, plain_form
from iiet.hf.weights import CONFIG, LazyTensor
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from orchestrator.models import folder as folders
from orchestrator.models import lookup
from orchestrator.models import tokenizer as tokenizers
from orchestrator.models.folder import StoredPrecision
from orchestrator.models.hub import download, is_hub_name, license_of
from orchestrator.models.labels import model_name, name_with_owner
from orchestrator.models.open import open_model
from orchestrator.pipelines.context import Context, open_context
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.metrics import DECODE_MS
from orchestrator.records.tracked_run import RegisteredModel, TrackedRun
from orchestrator.records.training import TrainingJob, model_family
from orchestrator.records.trial import Trial
from orchestrator.reporting import findings, pick_rules, results
from orchestrator.reporting.front import FrontAxes, parse_axes
from orchestrator.reporting.model_card import ModelCard
from orchestrator.reporting.output import Result
from orchestrator.reporting.retention import Loss, loss_text
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes, format_parameters
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import new_folder, resolve_path, write_text
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace, find_checkpoints, find_workspace
from orchestrator.workspace.provenance import content_key, environment, file_digest, file_key

if TYPE_CHECKING:
    from torch import Tensor

    from iiet.decoder import Decoder

EXPORTED_FILE_BYTES = 5 * 10**9
"""Largest file of exported weights; larger models have several files."""
CARD = "README.md"


# Import


def imported_model(
    model: Path | str | None,
    workspace: Workspace | Path | str | None,
    progress: Progress | None = None,
    *,
    also_folders: bool = False,
) -> Path | None:
    """Return a model as `open_model` takes it, after an import if that is necessary.

    `hub:OWNER/NAME` is imported as the run `NAME`; a repeated import finds the first one.

    Args:
        model: As a user names it; None stays None.
        also_folders: Also import a model folder from elsewhere, to train from its weights.

    Raises:
        UserError: If there is no such model; and as `import_model`.
    """
    if model is None:
        return None
    if is_hub_name(model):
        return import_model(model, workspace=workspace, progress=progress)
    if also_folders:
        opened = open_model(model, find_workspace(workspace), needs_weights=False)
        if opened.is_external:
            return import_model(opened.path, workspace=workspace, progress=progress)
    return Path(model)


def import_model(
    folder: Path | str,
    *,
    workspace: Workspace | Path | str | None = None,
    tokenizer: Path | str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a checkpoint of a model and return it; a repeated import finds the first one.

    Args:
        folder: A model folder (with the paper's names of weights, of a plain model as docs/hub.md
            lists them, an export, or a checkpoint or run of another workspace), a GGUF file of a
            Llama, or `hub:OWNER/NAME`.
        tokenizer: A `tokenizer.json`, or `hub:NAME`, to use instead of the model's own, if any.
        name: Name of the run; the name of the folder or file when unset.

    Raises:
        UserError: If the model cannot be read or downloaded, the tokenizer does not fit it, or
            another model has the name.
    """
    from orchestrator.training.checkpoint import save_checkpoint  # Imports PyTorch.

    context = open_context(workspace, progress)
    progress = context.progress
    progress.start("import")  # A download takes time.
    path = download(folder) if is_hub_name(folder) else resolve_path(folder)
    if not path.exists():
        missing = f"{path} is not a model folder: there is nothing of this name"
        raise UserError(f"{missing}{lookup.hub_hint(Path(folder))}")
    other_tokenizer = tokenizers.tokenizer_path(tokenizer).absolute() if tokenizer else None
    with TemporaryDirectory() as scratch:
        source = _read_source(path, Path(scratch), with_tokenizer=other_tokenizer is None)
        config = source.config
        tokenizer_file = other_tokenizer
        if tokenizer_file is None and (source.texts / folders.TOKENIZER).is_file():
            tokenizer_file = source.texts / folders.TOKENIZER
        if tokenizer_file is None:
            progress.note(
                f"{source.texts} has no tokenizer.json: the model can be used with token ids only; "
                "import it with --tokenizer FILE to generate and evaluate"
            )
        else:
            num_ids = tokenizers.num_token_ids(tokenizers.load_tokenizer(tokenizer_file))
            if num_ids > config.vocab_size:
                raise UserError(
                    f"the tokenizer {other_tokenizer or f'of {source.name}'} has {num_ids} "
                    f"entries, the model only {config.vocab_size}"
                )
        texts_key: list[Any] | None = None
        if other_tokenizer:
            texts_key = [file_key(other_tokenizer), folders.text_files_key(other_tokenizer.parent)]
        key = content_key(source.key, texts_key)
        run = context.workspace.runs / (name or re.sub(r"[^\w.-]+", "-", source.run_name))
        # A failed or killed import leaves a folder that is empty or has only hidden files.
        is_made = run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir())
        if is_made and _imported_key(run) != key:
            raise UserError(
                f"the workspace has another run named {run.name}; choose one with --name"
            )
        if is_made:
            checkpoint = folders.resolve_checkpoint(run)
        else:
            checkpoint = save_checkpoint(
                run,
                0,
                config=config,
                weights=source.weights,
                training_state={},
                tokenizer_path=tokenizer_file,
                text_files=tokenizers.text_files_of(
                    source.texts, tokenizer_file, vocab_size=config.vocab_size
                ),
                provenance={
                    "objective": "import",
                    "imported": {
                        "from": source.name,
                        "repository": source.name if is_hub_name(folder) else None,
                        "license": license_of(path) if path.is_dir() else None,
                        "source": key,
                        "model_type": source.model_type,
                        "dtype": source.dtype,
                    },
                    "environment": environment(),
                },
            )
    journal = Journal(run)
    journal.event("imported")  # Makes it the newest run, which commands use by default.
    journal.close()
    count = format_parameters(num_parameters(config))
    progress.finish(f"{config.method}, {count} parameters")
    return checkpoint


def _imported_key(run: Path) -> str | None:
    """Return the key of the import that made a run; None for any other run."""
    checkpoints = find_checkpoints(run)
    if not checkpoints:
        return None
    imported = folders.load_provenance(checkpoints[-1]).get("imported", {})
    key: str | None = imported.get("source")
    return key


class _Source(NamedTuple):
    """A model to import."""

    config: ModelConfig
    weights: Mapping[str, Tensor | LazyTensor]
    """Weights in float32; those of a folder are read lazily."""
    name: str
    run_name: str
    """Default name of the run."""
    key: str
    """Hash of the model's files."""
    texts: Path
    """Folder of the tokenizer and the chat files."""
    model_type: str | None
    """Model type in transformers, which an export gets again; None for a model of this program."""
    dtype: StoredPrecision
    """Type of the weights, which an export gets again."""


def _read_source(path: Path, scratch: Path, *, with_tokenizer: bool) -> _Source:
    from orchestrator.models.gguf import read_gguf  # Both import PyTorch.
    from orchestrator.models.load import open_weights

    if path.is_file():
        decoder = read_gguf(path, scratch, with_tokenizer=with_tokenizer)
        return _Source(
            config=decoder.config,
            weights=decoder.state_dict(),
            name=path.name,
            run_name=path.stem,
            key=file_key(path),
            texts=scratch,
            model_type="llama",
            dtype="fp32",
        )
    if find_checkpoints(path):
        path = folders.resolve_checkpoint(path)
    elif not (path / CONFIG).is_file() and (ggufs := sorted(path.glob("*.gguf"))):
        raise UserError(f"{path} is not a model folder; name the GGUF file in it: {ggufs[0]}")
    model_type = folders.read_config(path).get("model_type")
    config, weights = open_weights(path)
    return _Source(
        config=config,
        weights=weights,
        name=name_with_owner(path),
        run_name=model_name(path),
        key=folders.model_files_key(path),
        texts=path,
        model_type=model_type if model_type in MODEL_TYPES else None,
        dtype=folders.weights_precision(path),
    )


# Export


def export(
    model: Path | str | None = None,
    *,
    workspace: Workspace | Path | str | None = None,
    settings: Settings | None = None,
    to: Path | str | None = None,
    schedule: str | None = None,
    measure: bool = True,
    force: bool = False,
    dtype: StoredPrecision | None = None,
    progress: Progress | None = None,
) -> Path:
    """Export a checkpoint with its card, and return the folder.

    Args:
        model: A checkpoint or run, by path or name; the newest of finished runs and the last pick
            when unset.
        settings: Section `evaluation`: tasks for the card's quality; the defaults when unset.
        to: Folder to write; when unset, one in the workspace, named by the run.
        schedule: Iteration schedule as typed, if not the checkpoint's own.
        measure: Evaluate the model for the card. If that fails, the card has no quality.
        force: Replace an export of another model in `to`.
        dtype: Type of the weights in the folder; when unset, that of an imported model's own
            files, and float32 for a model that was trained here.

    Raises:
        UserError: If the checkpoint, the schedule or the folder cannot be used.
    """
    settings = settings or Settings()
    context = open_context(workspace, progress)
    note = context.progress.note
    name = imported_model(model, context.workspace, context.progress)
    opened = open_model(name, context.workspace, schedule, folders="none", note=note)
    checkpoint = opened.path
    decoder = opened.decoder(frozen=True)  # Mapped from its file.
    default_name = model_name(checkpoint)
    if opened.schedule_label:
        default_name += f"-r{decoder.config.corrections}".replace(",", "")
    replaces = force or to is None  # The default folder belongs to the run.
    folder = resolve_path(to) if to else context.workspace.exports / default_name
    check_target(folder, None if replaces else (checkpoint, decoder.config))
    evaluation = None
    if measure:
        from orchestrator.pipelines.evaluating import EvaluatePlan, run_evaluate  # lm-eval's.

        plan = EvaluatePlan(
            settings=settings, workspace=context.workspace, opened={opened.label: opened}
        )
        try:
            (evaluation,) = run_evaluate(plan, context).evaluations.values()
        except (UserError, RunFailed) as error:
            note(f"the card is without quality: {error}")
    metric = settings.influence.metric
    card = model_card(context, checkpoint, decoder.config, evaluation, metric=metric)
    return export_checkpoint(
        checkpoint,
        folder,
        decoder=decoder,
        card=card,
        dtype=dtype,
        replaces=replaces,
        progress=context.progress,
    )


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    decoder: Decoder,
    card: ModelCard,
    dtype: StoredPrecision | None = None,
    replaces: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a decoder with a checkpoint's tokenizer and text files, and return the folder.

    Args:
        checkpoint: Holds the tokenizer, and an imported model's tokenizer and chat files.
        folder: Created if missing; an earlier export of this model, without other files, is
            replaced. It gets its name when it is complete.
        decoder: The model; its own schedule becomes the default. Weights may be mapped from the
            checkpoint, because they are written one by one.
        card: Text of `README.md`.
        dtype: Type of the weights; when unset, that of the imported files.
        replaces: Replace an export of another model, too.

    Raises:
        UserError: If the folder holds something else or cannot be written, the tokenizer has no
            end-of-text token, a weight is too large for the type, or the source code of the method
            cannot be copied.
    """
    from iiet import exporting  # Imports PyTorch.
    from orchestrator.models.load import STORED_DTYPES

    progress = progress or Progress()
    model = None if replaces else (checkpoint, decoder.config)
    check_target(folder, model)
    progress.start("export")
    file = checkpoint / folders.TOKENIZER
    text_files = folders.read_text_files(checkpoint)
    end_of_text = ""
    token_ids = None
    if file.is_file() and not text_files:
        tokenizer = tokenizers.load_tokenizer(file)
        end_of_text = str(tokenizer.id_to_token(tokenizers.end_of_text_id(tokenizer)))
    imported: dict[str, Any] = {}
    if folders.is_checkpoint(checkpoint):
        imported = folders.load_provenance(checkpoint).get("imported", {})
    source_dtype = imported.get("dtype", "fp32")
    dtype = dtype or source_dtype
    card = replace(card, dtype=dtype, is_rounded=dtype not in ("fp32", source_dtype))
    if folders.GENERATION_CONFIG in text_files:
        values = json.loads(text_files[folders.GENERATION_CONFIG])
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        token_ids = {name: values.get(name) for name in names}
    try:
        with new_folder(folder) as temporary:
            exporting.export(
                decoder,
                temporary,
                file if file.is_file() else None,
                end_of_text=end_of_text,
                token_ids=token_ids,
                text_files=text_files or None,
                model_type=imported.get("model_type"),
                dtype=STORED_DTYPES[dtype],
                max_file_bytes=EXPORTED_FILE_BYTES,
            )
            write_text(temporary / CARD, card.to_markdown())
            lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
            write_text(temporary / folders.MANIFEST, "".join(lines))
            check_target(folder, model)  # Another process may have written there meanwhile.
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    except OverflowError as error:
        raise UserError(
            f"--dtype {dtype} cannot hold some weights of this model ({error}); take bf16 or fp32"
        ) from None
    except ValueError as error:  # The source code of a package's method cannot be copied.
        raise UserError(f"cannot export this model: {error}") from None
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    contents = "tokenizer and card" if is_plain(decoder.config) else "code, tokenizer and card"
    progress.finish(f"{format_bytes(num_bytes)} with {contents}")
    return folder


def check_target(folder: Path, model: tuple[Path, ModelConfig] | None = None) -> None:
    """Raise `UserError` if a folder cannot be written, or holds anything but an earlier export.

    Args:
        model: Checkpoint and configuration: an export of another model is an error, too.
    """
    try:
        # Permissions are not enough: root may write everywhere, but not in /proc.
        with TemporaryDirectory(dir=next(parent for parent in folder.parents if parent.exists())):
            pass
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror}); choose another folder with --to"
        ) from None
    digests = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / folders.MANIFEST).read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            digests[name] = digest
    if CONFIG not in digests:
        raise UserError(f"{folder} exists and is not an earlier export; choose another with --to")
    changed_or_new = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name != folders.MANIFEST
        and not (path.is_file() and file_digest(path) == digests.get(path.name))
    ]
    if changed_or_new:
        raise UserError(
            f"{folder} is an earlier export, and some of its files are not as the export wrote "
            f"them: {', '.join(changed_or_new[:4])}; move them away, or choose another folder with "
            "--to"
        )
    if model is None:
        return
    checkpoint, config = model
    if is_plain(config):
        config = plain_form(config)
    # The card, which is unchanged unless it is missing, names the weights.
    card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
    if (
        f"weights: `{folders.weights_key(checkpoint)}`" not in card
        or folders.decoder_config(folder) != config
    ):
        raise UserError(
            f"{folder} is an export of another model; replace it with --force, or choose another "
            "folder with --to"
        )


def model_card(
    context: Context,
    checkpoint: Path,
    config: ModelConfig,
    evaluation: EvaluationResult | None,
    *,
    influence: InfluenceTable | None = None,
    metric: str | None = None,
) -> ModelCard:
    """Gather what is known about a checkpoint.

    Args:
        context: Its workspace holds the teacher, if there is one.
        config: The checkpoint's configuration, with the schedule that is exported.
        influence: The table that chose its schedule; when unset, that of the teacher, else of the
            model itself.
        metric: Metric of the table to look for.
    """
    provenance = folders.load_provenance(checkpoint)
    # Several runs may have the teacher's weights; any of them may have the influence.
    teachers = lookup.find_checkpoints_by_weights(
        context.workspace, str(provenance.get("teacher") or "")
    )
    full = folders.load_config(teachers[0] if teachers else checkpoint)
    if influence is None:
        influence = lookup.find_influence_table(teachers, metric)
    prompt = ModelCard.prompt
    file = checkpoint / folders.TOKENIZER
    if file.is_file():
        tokenizer = tokenizers.ModelTokenizer(file)
        try:
            tokenizer.encode(prompt, add_special_tokens=False)
        except UserError:  # A tokenizer of depth tasks reads only symbols.
            prompt = "".join(tokenizer.symbols[:2])
    ancestors = _with_ancestors(checkpoint)
    imported = folders.load_provenance(ancestors[-1]).get("imported", {})
    return ModelCard(
        name=f"{config.method} {model_name(checkpoint)}",
        config=config,
        provenance={**provenance, "weights": folders.weights_key(checkpoint)},
        evaluation=evaluation,
        influence=influence or lookup.load_influence_table(checkpoint, metric),
        served=folders.served_schedules(checkpoint),
        full=full if full.corrections != config.corrections else None,
        prompt=prompt,
        base_model=imported.get("repository") or "",
        license=imported.get("license") or "",
        datasets=_hub_datasets(ancestors),
    )


def _with_ancestors(checkpoint: Path) -> list[Path]:
    """Return a checkpoint and its ancestors, from whose weights it started, as far as they
    exist."""
    checkpoints = [checkpoint]
    while True:
        job = TrainingJob.of_folder(checkpoints[-1].parent)
        initial = job and job.initial_folder
        if not initial or not Path(initial).is_dir():
            return checkpoints
        checkpoints.append(Path(initial))


def _hub_datasets(checkpoints: Sequence[Path]) -> list[str]:
    """Return the known Hugging Face data sets of checkpoints' training data."""
    from orchestrator.data.mixture import open_data  # Imports PyTorch.

    names: dict[str, None] = {}
    for checkpoint in checkpoints:
        job = TrainingJob.of_folder(checkpoint.parent)
        if job is None:
            continue
        with suppress(UserError):  # The tokens may be gone.
            for data in open_data(job.tokens_folder).parts:
                if name := data.profile.get("hub_name"):
                    names[name.partition("@")[0]] = None  # Without its revision.
    return list(names)


# Pick


class PickResult(Result):
    """The model that was picked from a sweep; in a plan, it is not exported yet."""

    name: str
    """Name of the model, without its seed; all numbers are means over the seeds."""
    method: str
    """The model's method."""
    schedule: tuple[int, ...] | None
    """The model's corrections, or `null` without."""
    sentence: str
    """Schedule, quality, cost and confidences of the model, as a sentence."""
    metrics: dict[str, float]
    """Every metric by its name."""
    checkpoint: str | None
    """The model's weights."""
    folder: Path | None = None
    """Folder of the export; None if it was not exported."""
    version: str | None = None
    """Address in MLflow's registry, such as `models:/iiet-tiny@knee`; None if not registered.

    The name has method and preset, and the alias names the rule. So another pick by the same rule,
    also from another sweep, moves the alias to its own version.
    """
    sweep: results.StoredSweep = Field(exclude=True)
    axes: FrontAxes = Field(exclude=True)
    alias: str = Field(exclude=True)
    """Name of the rule."""
    point: Trial = Field(exclude=True)
    """The model with means over its seeds."""
    model: Trial = Field(exclude=True)
    """The seed whose weights are used: the lowest one."""
    target: Path | None = Field(exclude=True)
    """Folder to export to; under the workspace when unset."""
    force: bool = Field(exclude=True)
    """Whether to replace an export of another model there."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row: the model's parameters and metrics."""
        return [{"name": self.name, **self.point.params(), **self.metrics}]

    def shown(self) -> Iterator[str]:
        yield f"{self.alias}: {self.sentence}"
        if self.folder is None:
            yield f"checkpoint: {self.checkpoint}"
        else:
            yield f"exported: {self.folder}"
        if self.version:
            yield f"registered: {self.version}"


def plan_pick(
    sweep: str | None = None,
    *,
    workspace: Workspace | Path | str | None = None,
    keep: float | None = None,
    confidence: float = 0.0,
    budget: float | None = None,
    knee: bool = False,
    best: bool = False,
    cheapest: bool = False,
    cost: str | None = None,
    quality: str | None = None,
    allow_loss: bool = False,
    to: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PickResult:
    """Choose a model from a sweep's front.

    `generate` then uses it by default, until a model is trained or imported.

    Args:
        sweep: Name of the sweep; the newest when unset.
        keep: The cheapest model that keeps this share of the quality; the default rule, at 0.99.
            If the teacher gains nothing over r = 0, and r = 0 keeps as much, that is chosen.
        confidence: With `keep`: the confidence that the model keeps so much.
        budget: The best model that costs at most this much.
        knee: The model farthest above the line between the ends of the front.
        best: The model of highest quality.
        cheapest: The model of lowest cost.
        cost, quality: Axes of the front, as in `report`.
        allow_loss: Also choose a model that has lost more against the teacher's source model than
            the sweep's `evaluation.retention` allows, or whose loss is unknown.
        to: Folder to export to; under the workspace when unset.
        force: Replace an export of another model there.

    Raises:
        UserError: If there are two rules or no such sweep, no model meets the rule, the chosen
            model has lost too much, its weights are missing, or the folder cannot be used.
    """
    from orchestrator.reporting.front import (
        busy_machine,
        reason_against_accuracy,
        retention_reference,
        sweep_front,
    )

    rule = pick_rules.pick_rule(
        keep=keep,
        confidence=confidence,
        budget=budget,
        knee=knee,
        best=best,
        cheapest=cheapest,
    )
    parse_axes(cost, quality)  # Refuse a wrong name before reading anything.
    workspace = find_workspace(workspace)
    stored = results.load_sweep_results(workspace, sweep or results.newest_sweep(workspace))
    reason = reason_against_accuracy(workspace, stored.results, demanded_share=rule.demanded_share)
    axes = parse_axes(cost, quality, against_accuracy=reason)
    front, notes = sweep_front(workspace, [stored], axes, demanded_share=rule.demanded_share)
    if axes.cost == DECODE_MS and (problem := busy_machine(front.placed)):
        notes = [*notes, problem]
    for note in notes:
        (progress or Progress()).note(note)
    picked = pick_rules.pick_from_front(front, rule)
    losses = front.losses.get(picked.key, ())
    compared = retention_reference(front)
    reference = compared.role if compared else "source"
    if stored.retention and not allow_loss:
        _refuse_loss(picked.label, losses, reference)
    point = picked.trial
    seeds = picked.seeds
    sentence = findings.describe_pick(front, picked)
    if any(not loss.is_within_bound for loss in losses):
        sentence += f"; it {loss_text(losses)} against the {reference}"
    result = results.lowest_seed(seeds)
    if len(seeds) > 1:
        number = f"{len(seeds)} seeds, its checkpoint is that of seed {result.seed}"
        sentence += f"; its numbers are means over {number}"
    return PickResult(
        name=point.name,
        method=point.method,
        schedule=point.schedule,
        sentence=sentence,
        metrics=point.metrics(),
        checkpoint=point.checkpoint,
        sweep=stored,
        axes=axes,
        alias=rule.alias,
        point=point,
        model=result,
        target=resolve_path(to) if to else None,
        force=force,
    )


def _refuse_loss(label: str, losses: Sequence[Loss], reference: str) -> None:
    """Raise `UserError` if a model has, or may have, lost too much against the source model or a
    plain teacher."""
    if not losses:
        raise UserError(
            f"evaluation.retention bounds what {label} may lose against the {reference}, which was "
            "not measured; run the sweep again to measure it, or add --allow-loss"
        )
    if any(not loss.is_within_bound for loss in losses):
        bounds = ", ".join(f"{loss.bound:g}" for loss in losses if not loss.is_within_bound)
        raise UserError(
            f"{label} {loss_text(losses)} against the {reference}, and evaluation.retention allows "
            f"{bounds}; choose another model by another rule, or add --allow-loss"
        )


def run_pick(plan: PickResult, context: Context) -> PickResult:
    """Choose a model from a sweep's front; export and register it."""
    from orchestrator.training.tracked_runs import trial_model

    sweep = plan.sweep
    result = plan.model
    workspace = context.workspace
    model = trial_model(result)
    if result.checkpoint is None or model is None:
        raise UserError(f"the sweep {sweep.name} has no weights of {result.name} to export")
    opened = open_model(result.checkpoint, schedule=result.opened_schedule)
    checkpoint = opened.path
    decoder = opened.decoder(frozen=True)  # Mapped from its file.
    evaluation = results.load_item_values(workspace, [result]).get(result.key)
    card = model_card(
        context,
        checkpoint,
        decoder.config,
        evaluation,
        influence=sweep.influence_of(result),
        metric=sweep.influence.metric if sweep.influence else None,
    )
    chosen = f"`{plan.alias}` of the sweep `{sweep.name}`: {plan.sentence}."
    folder = export_checkpoint(
        checkpoint,
        plan.target or workspace.exports / sweep.name / plan.alias,
        decoder=decoder,
        card=replace(card, chosen=chosen),
        # The default folder belongs to the rule.
        replaces=plan.force or plan.target is None,
        progress=context.progress,
    )

    name = model_family(decoder.config)
    tags = {"sweep": sweep.name, "schedule": result.schedule_text}
    axes = (plan.axes.cost, plan.axes.quality)
    tags |= {axis: f"{result.value(axis):.6g}" for axis in axes}
    run = context.tracking.stored(result.role, result.key, sweep.key) or TrackedRun(
        key=result.key, kind=result.role, name=result.run_name, parent=sweep.key
    )
    context.tracking.publish(run)
    registered = RegisteredModel(
        name=name,
        alias=plan.alias,
        run=run.identity,
        model=model,
        folder=str(folder),
        note=plan.sentence,
        tags={tag: text for tag, text in tags.items() if text},
    )
    is_registered = context.tracking.register(registered)
    lookup.Picked(
        sweep=sweep.name,
        checkpoint=str(checkpoint),
        schedule=result.opened_schedule,
        time=time.time(),
    ).write(workspace.picked)
    version = f"models:/{name}@{plan.alias}" if is_registered else None
    return plan.model_copy(update={"folder": folder, "version": version})


def pick(
    sweep: str | None = None,
    *,
    workspace: Workspace | Path | str | None = None,
    keep: float | None = None,
    confidence: float = 0.0,
    budget: float | None = None,
    knee: bool = False,
    best: bool = False,
    cheapest: bool = False,
    cost: str | None = None,
    quality: str | None = None,
    allow_loss: bool = False,
    to: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PickResult:
    """Choose a model from a sweep's front; export and register it.

    Arguments and errors are those of `plan_pick`.
    """
    plan = plan_pick(
        sweep,
        workspace=workspace,
        keep=keep,
        confidence=confidence,
        budget=budget,
        knee=knee,
        best=best,
        cheapest=cheapest,
        cost=cost,
        quality=quality,
        allow_loss=allow_loss,
        to=to,
        force=force,
        progress=progress,
    )
    return run_pick(plan, open_context(workspace, progress))
