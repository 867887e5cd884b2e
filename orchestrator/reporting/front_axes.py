"""The two numbers that a front lies on, and their short names at the command line."""

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


@dataclass(frozen=True)
class FrontAxes:
    """Two numbers of a trial result: what it costs and how good it is."""

    cost: str = "cost/evaluations"
    """Tracked name of the cost; lower is better."""
    quality: str = "quality/accuracy"
    """Tracked name of the quality."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the quality is better: not so for losses, told by their names."""
        return not self.quality.endswith(LOWER_IS_BETTER)

    @property
    def error(self) -> str:
        """Tracked name of the quality's standard error."""
        return f"{self.quality}_stderr"

    @property
    def slug(self) -> str:
        """Both short names with a dash, for names of folders; empty for the usual two."""
        if self == FrontAxes():
            return ""
        return f"{_short(QUALITIES, self.quality)}-{_short(COSTS, self.cost)}"


def parse_axes(cost: str | None = None, quality: str | None = None) -> FrontAxes:
    """Return the axes that short names stand for; the usual ones when unset.

    Raises:
        UserError: If a name is unknown; lists those there are.
    """
    usual = FrontAxes()
    return FrontAxes(
        _named(COSTS, cost, "--cost") if cost else usual.cost,
        _named(QUALITIES, quality, "--quality") if quality else usual.quality,
    )


def _named(names: Mapping[str, str], name: str, option: str) -> str:
    if name not in names:
        raise UserError(f"{option} is one of {', '.join(names)}; got {name!r}")
    return names[name]


def _short(names: Mapping[str, str], tracked: str) -> str:
    known = {name: short for short, name in names.items()}
    return known.get(tracked, tracked.partition("/")[2].replace("/", "-"))


TITLES = {
    "cost/evaluations": "Evaluations per token",
    "cost/relative_evaluations": "Evaluations, share of the full model's",
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


def metric_title(name: str) -> str:
    """Return what a tracked number is called: known names in words, others as they are."""
    return TITLES.get(name, name.partition("/")[2] or name)


def is_accuracy(name: str) -> bool:
    """Tell whether a tracked number is a share of right answers, shown in percent."""
    return name.endswith(("accuracy", "/acc", "/acc_norm"))
