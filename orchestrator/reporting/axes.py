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
class Axes:
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
        if self == Axes():
            return ""
        return f"{_short(QUALITIES, self.quality)}-{_short(COSTS, self.cost)}"


def named_axes(cost: str | None = None, quality: str | None = None) -> Axes:
    """Return the axes that short names stand for; the usual ones when unset.

    Raises:
        UserError: If a name is unknown; lists those there are.
    """
    usual = Axes()
    return Axes(
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
