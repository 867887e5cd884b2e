"""The whole tree of settings, and its sections for influence and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from iiet.influence_metrics import INFLUENCE_METRICS
from orchestrator.settings.choices import OneOf
from orchestrator.settings.cluster import ClusterSettings
from orchestrator.settings.model import DataSettings, ModelSettings
from orchestrator.settings.prompts import Prompts
from orchestrator.settings.section import MAX_COUNT, Section
from orchestrator.settings.sweep import SearchSettings, SweepSettings
from orchestrator.settings.tracking import TrackingSettings
from orchestrator.settings.training import DistillationSettings, TrainingSettings


class InfluenceSettings(Section):
    """Measurement of each correction's influence."""

    metric: Annotated[str, OneOf(INFLUENCE_METRICS)] = "cosine"
    """`cosine`, `relative` (both from consecutive evaluations), `loss` (rise of the validation
    loss), or a metric of another package."""
    num_tokens: int = Field(default=32768, gt=0)
    """Validation tokens of the calibration set."""


class EvaluationSettings(Section):
    """Tasks that measure accuracy."""

    suite: str = "heldout"
    """Comma-separated names: `heldout` (tasks made from the data: from held-out documents, or the
    depth tasks that are trained), one of these tasks by itself (`phop_6`), `paper` (the seven tasks
    of the papers), and any task of lm-eval or of `include_path`."""
    num_items: int = Field(default=700, gt=0)
    """Items of each held-out task; 700 keep one standard error under 1.9 points."""
    limit: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Score only this many items of each task, from its first on (default: all)."""
    num_fewshot: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Solved examples before each item, unless a task fixes it at 0 (default: the task's own
    number)."""
    apply_chat_template: bool | str = False
    """Write prompts with the model's chat template: `true`, or the name of one of its templates."""
    fewshot_as_multiturn: bool = True
    """With a chat template, solved examples are turns of the chat; `false` puts them into the
    user's one message."""
    system_instruction: str | None = Field(default=None, min_length=1)
    """Text directly before each prompt; with a chat template, the system's message."""
    batch_size: int = Field(default=32, gt=0, le=MAX_COUNT)
    """Sequences in one forward pass of the evaluation."""
    precision: Literal["fp32", "bf16"] | None = None
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

    @property
    def trials_use_gpus(self) -> bool:
        """Whether a sweep's trials run on GPUs (default: as `cluster.num_gpus` says)."""
        own = self.sweep.gpus_per_trial
        return (self.cluster.num_gpus if own is None else own) > 0
