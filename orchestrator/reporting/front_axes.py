"""Cost and quality of a front: which tracked metrics they are, their option values and titles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.workspace.errors import UserError

LOWER_IS_BETTER = ("loss", "bits_per_byte", "perplexity", "ppl", "error")

COSTS = {
    "evaluations": "cost/evaluations",
    "flops": "cost/flops_per_token",
    "ms": "cost/decode_ms_per_token",
    "kv": "cost/kv_bytes_per_token",
}
QUALITIES = {
    "accuracy": "quality/accuracy",
    "bits": "quality/bits_per_byte",
    "perplexity": "quality/perplexity",
    "loss": "quality/validation_loss",
}
TITLES = {
    "cost/evaluations": "NFE per token",
    "cost/relative_evaluations": "NFE, share of the full model's",
    "cost/flops_per_token": "FLOPs per token",
    "cost/relative_flops": "FLOPs per token, share of the full model's",
    "cost/kv_bytes_per_token": "KV cache, bytes per token",
    "cost/decode_ms_per_token": "Decoding, ms per token",
    "quality/accuracy": "Accuracy",
    "quality/bits_per_byte": "Bits per byte",
    "quality/validation_loss": "Validation loss, nats per token",
    "quality/perplexity": "Perplexity of a token",
    "paired/confidence_keeps_99": "Confidence: keeps 99%",
    "paired/confidence_on_front": "Confidence: on the front",
}

PAPER_COST_SHARE, PAPER_QUALITY_SHARE = 0.45, 0.994
"""The paper's headline: E-IIET at 55% less inference cost keeps 99.4% of IIET's accuracy."""
PAPER_MARK = "paper: 55% less at 99.4%"


@dataclass(frozen=True)
class FrontAxes:
    """Two metrics of a trial result: its cost and its quality."""

    cost: str = "cost/evaluations"
    """Tracked name of the cost; lower is better."""
    quality: str = "quality/accuracy"
    """Tracked name of the quality."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher quality is better; losses, recognized by name, are better lower."""
        return not self.quality.endswith(LOWER_IS_BETTER)

    @property
    def error(self) -> str:
        """Tracked name of the quality's standard error."""
        return f"{self.quality}_stderr"

    @property
    def in_words(self) -> str:
        """Both axes, as `accuracy and NFE per token`."""
        return f"{metric_title(self.quality).lower()} and {metric_title(self.cost)}"

    @property
    def slug(self) -> str:
        """Both option values joined by a dash, for folder names; empty for the default axes."""
        if self == FrontAxes():
            return ""
        return f"{_option_value(QUALITIES, self.quality)}-{_option_value(COSTS, self.cost)}"


def parse_axes(cost: str | None = None, quality: str | None = None) -> FrontAxes:
    """Return the axes for two option values, such as `ms` and `bits`; the defaults for None.

    Raises:
        UserError: If a value is unknown.
    """
    default = FrontAxes()
    return FrontAxes(
        _tracked_name(COSTS, cost, "--cost") if cost else default.cost,
        _tracked_name(QUALITIES, quality, "--quality") if quality else default.quality,
    )


def metric_title(name: str) -> str:
    """Return the title of a tracked metric; the end of its name where there is no title."""
    return TITLES.get(name, name.partition("/")[2] or name)


def is_accuracy(name: str) -> bool:
    """Tell whether a tracked metric is a share of right answers, which is printed in percent."""
    return name.endswith(("accuracy", "/acc", "/acc_norm"))


def _tracked_name(names: Mapping[str, str], value: str, option: str) -> str:
    if value not in names:
        raise UserError(f"{option} is one of {', '.join(names)}; got {value!r}")
    return names[value]


def _option_value(names: Mapping[str, str], tracked: str) -> str:
    values = {name: value for value, name in names.items()}
    return values.get(tracked, tracked.partition("/")[2].replace("/", "-"))
