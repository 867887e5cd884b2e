"""Settings of what is measured of a model: influence, and tasks with their prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from iiet.model.facts import INFLUENCE_METRICS
from orchestrator.settings.section import MAX_COUNT, OneOf, Section
from orchestrator.settings.training import Precision
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key

METRIC = OneOf(INFLUENCE_METRICS)


class InfluenceSettings(Section):
    """Measurement of each correction's influence."""

    metric: Annotated[str, METRIC] | None = None
    """`cosine` or `relative` (change between consecutive evaluations), `loss` (rise of the
    validation loss), or a metric of another package (default: `cosine`, or `loss` where layers may
    be left out)."""
    one_at_a_time: StrictBool = False
    """Measure the influence of layers again after each one that is left out, which takes about
    L*L/2 passes for L layers."""
    num_tokens: StrictInt = Field(default=32768, gt=0)
    """Validation tokens that are read, in sequences as long as in the training, or of at most 1,024
    tokens for a model that was trained elsewhere."""


def usual_metric(*, of_whole_layers: bool) -> str:
    """Return the metric of `influence.metric` where none is set: of the corrections, or of whole
    layers, too."""
    return "loss" if of_whole_layers else "cosine"


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


RETENTION_BITS = "bits_per_byte"
"""In `evaluation.retention`: the bits per byte of Python's help topics."""
PYTHON_BITS_TASK = "python_bits_per_byte"
"""The task that measures them; every sweep can, whatever its data are."""
SHORT_ANSWERS = "short_answers"
"""The task of generated answers that needs no download, in `evaluation.retention` or the suite."""
DEFAULT_RETENTION = {RETENTION_BITS: 0.02}
"""About 2% of the bits that a model of a billion parameters needs for a byte of English, and 6% of
its perplexity per token of 4.4 bytes."""
_Bound = Annotated[StrictFloat, Field(ge=0)]


def retention_task(name: str) -> str:
    """Return the task that a name in `evaluation.retention` means."""
    return PYTHON_BITS_TASK if name == RETENTION_BITS else name


class EvaluationSettings(Section):
    """Tasks that measure accuracy."""

    suite: str = "heldout"
    """Comma-separated names: `heldout` (tasks from the held-out set) or one of these tasks
    (`phop_6`), `paper` (the seven tasks of the papers), `short_answers` (generated answers to short
    questions), and any task of lm-eval or of `include_path`."""
    num_items: StrictInt = Field(default=700, gt=0)
    """Items of each held-out task; 700 keep one standard error under 1.9 points."""
    limit: StrictInt | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Most items of each task, the first ones, and most sequences of a sweep's validation loss
    (default: all items, and 65,536 tokens)."""
    num_fewshot: StrictInt | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Solved examples before each item, unless the task allows none (default: the task's own
    number)."""
    apply_chat_template: StrictBool | str = False
    """Write prompts with the model's chat template: `true`, or the name of one of its templates."""
    fewshot_as_multiturn: StrictBool = True
    """With a chat template, solved examples are turns of the chat, or else parts of one message."""
    system_instruction: str | None = Field(default=None, min_length=1)
    """Text directly before each prompt; with a chat template, the system's message."""
    batch_size: StrictInt = Field(default=32, gt=0, le=MAX_COUNT)
    """Batch size of the evaluation, in sequences."""
    sequence_length: StrictInt | None = Field(default=None, gt=1)
    """Most tokens of an item, or of a sequence of a sweep's validation loss (default: the context
    length, which is the largest)."""
    precision: Precision | None = None
    """Weights and arithmetic of the evaluated model (default: bf16 on GPUs, fp32 on CPUs). Scores
    differ a little, so results of each are stored apart."""
    include_path: str | None = Field(default=None, min_length=1)
    """Folder with further lm-eval task files."""
    retention: dict[str, _Bound] | None = None
    """Most that a sweep's models may lose against the source model, or a plain teacher, by task:
    points of accuracy, or bits per byte of Python's help topics, such as `{arc_easy: 1.0,
    bits_per_byte: 0.02}`. `{}` sets no limit (default: `{bits_per_byte: 0.02}`, if there is a
    source model that reads text)."""

    @property
    def prompts(self) -> Prompts | None:
        """How items become prompts; None if as the tasks' files say."""
        prompts = Prompts(
            chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn or not self.apply_chat_template,
            system_instruction=self.system_instruction,
        )
        return None if prompts == Prompts() else prompts

    def tokens_at_once(self, context_length: int) -> int:
        """Return the most tokens that a model of this context reads at once.

        Raises:
            UserError: If the setting is longer than the context.
        """
        length = self.sequence_length or context_length
        if length > context_length:
            raise UserError(
                f"evaluation.sequence_length={length}: the model reads at most {context_length} "
                "tokens; set it to at most that, or leave it out"
            )
        return length
