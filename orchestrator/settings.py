"""Every setting of the program, in one frozen tree.

One road leads here: defaults, then a YAML file, then `--set a.b=c`. Unknown keys are errors with
the nearest known name, all problems are reported at once, and validation never edits a value.
Pydantic does the checking; this module turns its findings into one sentence each. The resolved tree
is saved beside every run, and the sections that determine a result are hashed into its key. The
defaults are those of the shipped sweep `toy`: they make a model in minutes on a CPU.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import UserError


class Section(BaseModel):
    """Base of all sections: frozen, strict about names, a sentence under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataSettings(Section):
    """What is read, how it is tokenized, and what is held out."""

    source: Literal["python", "files", "hub"] = "python"
    """`python`: the English that every Python carries; `files`: `files` below; `hub`: a `datasets`
    name."""
    files: tuple[str, ...] = ()
    """Paths or glob patterns of `.txt`, `.jsonl` (also `.jsonl.gz`) or `.parquet` files."""
    hub_name: str = ""
    """Name of a data set on the hub, for `source: hub`, such as `cerebras/SlimPajama-627B`."""
    hub_config: str | None = None
    """Configuration of the hub's data set, if it has several."""
    text_field: str = "text"
    """Field that holds the text in JSON lines, Parquet and hub data sets."""
    max_documents: int | None = Field(default=None, gt=0)
    """Read at most this many documents; no limit when unset."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the documents held out for validation and tasks, chosen by content hash."""
    tokenizer: str = "train"
    """`train` a byte-level BPE, or the path of a `tokenizer.json`, or `hub:NAME`."""
    vocab_size: int = Field(default=2048, ge=258)
    """Entries of a trained tokenizer."""


class ModelSettings(Section):
    """The model's shape: a preset, and what differs from it."""

    preset: str = "tiny"
    """Name of a preset: tiny, 55m, 340m, 740m, 1.3b."""
    method: str = "iiet"
    """How a layer advances the hidden state: iiet, vanilla, pcformer, or another known method."""
    corrections: int | str | tuple[int, ...] = 2
    """Corrections per layer (the iteration schedule): `3`, or one number a layer, `2,2,1,1,1,1`;
    iiet only."""
    dim: int | None = Field(default=None, gt=0)
    """Width of the hidden state; the preset's when unset, like all that follow."""
    num_layers: int | None = Field(default=None, gt=0)
    """Number of layers."""
    num_heads: int | None = Field(default=None, gt=0)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads."""
    ffn_dim: int | None = Field(default=None, gt=0)
    """Width of the feed-forward layer."""
    context_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens; also the length of the training sequences."""
    tie_embeddings: bool | None = None
    """Whether the output head shares the embedding's weights."""


class TrainingSettings(Section):
    """One recipe: how many tokens, which learning rates, how it is watched and saved."""

    num_steps: int = Field(default=500, gt=0)
    """Optimizer steps."""
    num_tokens_per_step: int = Field(default=1024, gt=0)
    """Tokens of the global batch; the same whatever the number of workers."""
    num_sequences_per_pass: int | None = Field(default=None, gt=0)
    """Most sequences in one forward pass of one worker (gradient accumulation); all at once when
    unset."""
    learning_rate: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: cosine to the final rate, stable then linear (wsd), or constant."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the steps in which `wsd` decays."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """AdamW's decay of matrices; norms, the mix and embeddings are not decayed."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's second moment."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    iterate_from_fraction: float = Field(default=0.6, ge=0.0, lt=1.0)
    """Two-stage training: no corrections (r = 0) before this share of the steps, the full schedule
    after."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: fp32, or bf16 autocast with fp32 weights."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of the data order."""
    validate_every_steps: int = Field(default=100, gt=0)
    """Steps between validation losses."""
    num_validation_tokens: int = Field(default=16384, gt=0)
    """Tokens of one validation loss."""
    checkpoint_every_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints kept on disk."""


def _distillation_training() -> TrainingSettings:
    return TrainingSettings(
        num_steps=60,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.0,
        iterate_from_fraction=0.0,
    )


class DistillationSettings(Section):
    """How a pruned student learns from its teacher (IIAD)."""

    control: Literal["distill", "cross_entropy", "pruned", "scratch"] = "distill"
    """`distill`, or a control: cross-entropy only, pruned as it is, or trained from scratch."""
    kl_weight: float = Field(default=1.0, ge=0.0)
    """Weight of KL(teacher || student) beside the cross-entropy."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Softmax temperature of both distributions; the loss is scaled by its square."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """Which divergence: KL(teacher || student), its reverse, or Jensen-Shannon."""
    hidden_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the error of the layers' hidden states; 0 leaves it out."""
    teacher_cache: Literal["auto", "live", "exact", "top_k"] = "auto"
    """Where a sweep's students find what their teacher says: `live` runs it in each, `exact` stores
    its logits once for all (the same losses), `top_k` its likeliest tokens and the others as one
    (another loss); `auto` is exact where that pays and the disk can spare it, and deletes it after
    the sweep; else live."""
    cache_top_k: int = Field(default=64, gt=0)
    """Likeliest tokens of `teacher_cache: top_k`."""
    training: TrainingSettings = Field(default_factory=_distillation_training)
    """The recipe of the distillation."""


class InfluenceSettings(Section):
    """How the influence of each correction is measured."""

    metric: Literal["cosine", "relative", "loss"] = "cosine"
    """`cosine`, `relative` (both from consecutive evaluations) or `loss` (rise of the validation
    loss)."""
    num_tokens: int = Field(default=32768, gt=0)
    """Validation tokens of the calibration set."""


class EvaluationSettings(Section):
    """What accuracy means."""

    suite: str = "heldout"
    """`heldout` (tasks made from the held-out documents), `paper` (the seven tasks of the papers),
    or lm-eval task names with commas between them."""
    num_items: int = Field(default=700, gt=0)
    """Items that each held-out task is made with; 700 keep one standard error under 1.9 points."""
    limit: int | None = Field(default=None, gt=0)
    """Items of each task that are scored, from its first on; all when unset."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each item, where a task does not fix it at 0; as it says if unset."""
    batch_size: int = Field(default=32, gt=0)
    """Sequences in one forward pass of the evaluation."""
    include_path: str | None = None
    """Folder with further lm-eval task files."""


class SweepSettings(Section):
    """Which trials a sweep runs."""

    kind: Literal["threshold", "iterations"] = "threshold"
    """`threshold`: students of one teacher; `iterations`: models trained from scratch."""
    num_schedules: int = Field(default=7, ge=2)
    """Schedules of a threshold sweep, spread evenly over cost, full and none included."""
    thresholds: tuple[float, ...] = ()
    """Thresholds to use instead; those that give the same schedule are one trial."""
    iterations: tuple[int, ...] = (0, 1, 2, 3)
    """Corrections per layer that `sweep-iterations` pretrains an IIET with."""
    methods: tuple[str, ...] = ("vanilla", "iiet")
    """Methods that `sweep-iterations` pretrains."""
    learning_rates: dict[str, float] = {"vanilla": 4e-3}
    """Peak learning rate of a method where it differs from `training.learning_rate`, by name."""
    stop_dominated: bool = False
    """End a trial whose validation loss cannot beat a finished one that costs no more. Off by
    default: the front is of accuracy, and a trial that is ended is never asked for it."""
    grace_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of a trial's steps before which it is not ended so."""
    trials_at_once: int | None = Field(default=None, gt=0)
    """Trials that run side by side; as many as there are CPUs (or GPUs) when unset."""
    max_failures_per_trial: int = Field(default=2, ge=0)
    """How often a failed trial is tried again."""


class ClusterSettings(Section):
    """Where the work runs."""

    num_workers: int = Field(default=1, gt=0)
    """Data-parallel workers of a training job; with GPUs, one each."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs of a training job; 0 trains on CPUs."""
    max_failures: int = Field(default=2, ge=0)
    """How often a training job whose worker died is started again from its newest checkpoint."""


class Settings(Section):
    """The whole tree."""

    data: DataSettings = DataSettings()
    """Corpus and tokenizer."""
    model: ModelSettings = ModelSettings()
    """Shape of the model."""
    training: TrainingSettings = TrainingSettings()
    """Recipe of the pretraining."""
    distillation: DistillationSettings = DistillationSettings()
    """Recipe of the distillation."""
    influence: InfluenceSettings = InfluenceSettings()
    """Measure of influence."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Tasks and their size."""
    sweep: SweepSettings = SweepSettings()
    """Trials of a sweep."""
    cluster: ClusterSettings = ClusterSettings()
    """Workers and GPUs."""


def resolve_settings(
    tree: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    *,
    origin: str = "settings",
) -> Settings:
    """Build the settings from a YAML tree and `a.b=c` assignments, in this order.

    Args:
        tree: Nested mapping as read from YAML; missing keys keep their defaults.
        assignments: Texts of the form `section.key=value`; the value is read as YAML.
        origin: What the tree came from; it stands in the error.

    Raises:
        UserError: Names every unknown key and every bad value at once.
    """
    merged = _deep_copy(tree or {})
    for assignment in assignments:
        _assign(merged, assignment)
    # Over the defaults of this very tree: the two recipes have one type and different defaults.
    merged = _merge(Settings().model_dump(), merged)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise UserError(_as_list(f"{origin}: {len(problems)} problem", problems)) from None


def read_settings(path: Path | None, assignments: Iterable[str] = ()) -> Settings:
    """Read a YAML file (or none) and apply assignments.

    Raises:
        UserError: If the file is missing or is not a YAML mapping, or a setting is wrong.
    """
    tree = read_yaml(path) if path else {}
    return resolve_settings(tree, assignments, origin=str(path) if path else "settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, unreadable, or no mapping of names to values.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the settings file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold names and values such as `training:`, not a {type(tree).__name__}"
        )
    return tree


def to_yaml(settings: Section) -> str:
    """Return the whole tree as YAML, in the order of declaration."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def flatten(settings: Section, prefix: str = "") -> dict[str, str]:
    """Return `section.key` -> value as text, for parameters of a tracked run."""
    flat: dict[str, str] = {}
    for name, value in settings:
        if isinstance(value, Section):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "" if value is None else str(value)
    return flat


def _assign(tree: dict[str, Any], assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not separator or not all(keys):
        raise UserError(
            f"--set takes section.key=value, such as training.num_steps=500; got {assignment!r}"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {name}: cannot read the value {text!r}; quote it") from None
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment}: {key} is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def _deep_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        both = isinstance(lower, Mapping) and isinstance(value, Mapping)
        merged[name] = _merge(lower, value) if both else value  # type: ignore[arg-type]
    return merged


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    section = _section_at(location[:-1])
    known = list(section.model_fields) if section else []
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else f"known: {', '.join(known)}"
        )
        return f"{'.'.join(location)} is no setting; {hint}"
    # A union or a tuple adds parts of its own behind the field's name; the user knows only the
    # field.
    while len(location) > 1 and location[-1] not in known:
        location.pop()
        section = _section_at(location[:-1])
        known = list(section.model_fields) if section else []
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{'.'.join(location)}: {message}; got {problem['input']!r}"


def _section_at(location: list[str]) -> type[Section] | None:
    section: type[Section] = Settings
    for name in location:
        field = section.model_fields.get(name)
        kind = field.annotation if field else None
        if not (
            isinstance(kind, type)
            and not isinstance(kind, types.GenericAlias)
            and issubclass(kind, Section)
        ):
            return None
        section = kind
    return section


def _as_list(title: str, problems: list[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return f"{title.split(':')[0]}: {unique[0]}"
    return "\n".join([f"{title}s", *(f"  - {text}" for text in unique)])
