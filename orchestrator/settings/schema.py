"""The whole tree of settings, and its small sections: influence, evaluation, loggers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Self, get_args

from pydantic import Field, StrictBool, StrictInt, field_validator, model_validator
from pydantic.fields import FieldInfo

from iiet.extensions import ExtensionNames
from iiet.names import INFLUENCE_METRIC_NAMES
from orchestrator.settings.cluster import ClusterSettings
from orchestrator.settings.data import DataSettings
from orchestrator.settings.rules import broken_rules
from orchestrator.settings.section import MAX_COUNT, OneOf, Section
from orchestrator.settings.sweep import SearchSettings, SweepSettings
from orchestrator.settings.training import (
    DistillationSettings,
    ModelSettings,
    Precision,
    TrainingSettings,
)
from orchestrator.workspace.provenance import content_key

MLFLOW, TENSORBOARD = "mlflow", "tensorboard"

LOGGERS = ExtensionNames(
    "iiet_orch.loggers", "logger", (TENSORBOARD,), is_reserved=lambda name: name == MLFLOW
)
"""Names of loggers beside MLflow, also of other packages; `orchestrator.tracking.log_mirror` has
their classes."""

METRIC = OneOf(INFLUENCE_METRIC_NAMES, table="iiet.influence_metrics:INFLUENCE_METRICS")


class InfluenceSettings(Section):
    """Measurement of each correction's influence."""

    metric: Annotated[str, METRIC] = "cosine"
    """`cosine`, `relative` (both from consecutive evaluations), `loss` (rise of the validation
    loss), or a metric of another package."""
    num_tokens: StrictInt = Field(default=32768, gt=0)
    """Validation tokens of the calibration set."""


class Prompts(Section):
    """The form of an evaluation's prompts; part of the key of what is measured."""

    chat_template: bool | str = False
    """Whether the model's chat template writes them, or the name of one of its templates."""
    fewshot_as_multiturn: bool = True
    """Whether solved examples are turns of the chat, or parts of the user's one message."""
    system_instruction: str | None = None
    """Text before each prompt; the system's message if a chat template writes it."""

    @property
    def key(self) -> str:
        """Hash of the form."""
        return content_key(self.model_dump(mode="json"))

    @property
    def template_name(self) -> str | None:
        """Name of the wanted template; None for the model's default."""
        return self.chat_template if isinstance(self.chat_template, str) else None


class EvaluationSettings(Section):
    """Tasks that measure accuracy."""

    suite: str = "heldout"
    """Comma-separated names: `heldout` (tasks made from the data: from held-out documents, or the
    depth tasks that are trained), one of these tasks by itself (`phop_6`), `paper` (the seven tasks
    of the papers), and any task of lm-eval or of `include_path`."""
    num_items: StrictInt = Field(default=700, gt=0)
    """Items of each held-out task; 700 keep one standard error under 1.9 points."""
    limit: StrictInt | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Score only this many items of each task, from its first on (default: all)."""
    num_fewshot: StrictInt | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Solved examples before each item, unless a task fixes it at 0 (default: the task's own
    number)."""
    apply_chat_template: StrictBool | str = False
    """Write prompts with the model's chat template: `true`, or the name of one of its templates."""
    fewshot_as_multiturn: StrictBool = True
    """With a chat template, solved examples are turns of the chat; `false` puts them into the
    user's one message."""
    system_instruction: str | None = Field(default=None, min_length=1)
    """Text directly before each prompt; with a chat template, the system's message."""
    batch_size: StrictInt = Field(default=32, gt=0, le=MAX_COUNT)
    """Sequences in one forward pass of the evaluation."""
    precision: Precision | None = None
    """Weights and arithmetic of the evaluated model (default: bf16 on GPUs, fp32 on CPUs). Scores
    differ a little, so results of each are stored apart. Models that transformers runs keep their
    own dtype."""
    include_path: str | None = Field(default=None, min_length=1)
    """Folder with further lm-eval task files."""

    @property
    def prompts(self) -> Prompts | None:
        """How items become prompts; None if as the tasks' files say."""
        prompts = Prompts(
            chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn or not self.apply_chat_template,
            system_instruction=self.system_instruction,
        )
        return None if prompts == Prompts() else prompts


class TrackingSettings(Section):
    """Loggers of trainings and sweeps."""

    loggers: tuple[Annotated[str, OneOf(LOGGERS, also=(MLFLOW,))], ...] = (MLFLOW,)
    """`mlflow`, which always logs; with `tensorboard`, also TensorBoard's files, in the workspace's
    folder `tensorboard`; and loggers of other packages."""

    @field_validator("loggers")
    @classmethod
    def _refuse_what_cannot_log(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        if MLFLOW not in loggers:
            raise ValueError("mlflow always logs, because reports link to it; name it, too")
        if TENSORBOARD in loggers and find_spec(TENSORBOARD) is None:
            raise ValueError(
                "the package tensorboard is not installed; `pip install 'iiet-orch[tensorboard]'` "
                "installs it, or leave tensorboard out"
            )
        return tuple(dict.fromkeys(loggers))


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
    """Measurement of influence."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Tasks and their size."""
    sweep: SweepSettings = SweepSettings()
    """Trials of a sweep."""
    search: SearchSettings = SearchSettings()
    """Search for free schedules."""
    cluster: ClusterSettings = ClusterSettings()
    """Workers and GPUs."""
    tracking: TrackingSettings = TrackingSettings()
    """Loggers of metrics."""

    @model_validator(mode="after")
    def _follow_the_rules(self) -> Self:
        if broken := broken_rules(self):
            raise ValueError("\n".join(broken))
        return self

    @property
    def trials_use_gpus(self) -> bool:
        """Whether a sweep's trials run on GPUs (default: as `cluster.num_gpus` says)."""
        own = self.sweep.gpus_per_trial
        return (self.cluster.num_gpus if own is None else own) > 0


def fields_of(location: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of the section at a location by name; none if it is not a section."""
    section: type[Section] = Settings
    for name in location:
        field = section.model_fields.get(name)
        # A section that may be left out is one of two types.
        types = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if not found:
            return {}
        section = found[0]
    return section.model_fields


def find_field(key: str) -> FieldInfo:
    """Return the field of a setting such as `training.num_steps`: type, limits, description.

    Raises:
        KeyError: If there is no such setting.
    """
    *sections, name = key.split(".")
    return fields_of(sections)[name]
