"""What all pictures and tables share: colors, names of numbers, how a picture is saved.

Colors are Okabe and Ito's, which the color-blind can tell apart; every distinction is also one of
shape. Matplotlib is used through its objects, without pyplot: no global state, no display, nothing
left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PINK, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
SERIES = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
GRAY, GRID = "#757575", "#dddddd"
DOTS_PER_INCH = 200

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


def title_of(name: str) -> str:
    """Return what a tracked number is called: known names in words, others as they are."""
    return TITLES.get(name, name.partition("/")[2] or name)


def is_accuracy(name: str) -> bool:
    """Tell whether a tracked number is a share of right answers, shown in percent."""
    return name.endswith(("accuracy", "/acc", "/acc_norm"))


def save_figure(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a picture as `stem.png` and `stem.svg`; the same picture gives the same bytes.

    Returns:
        The files written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    # Without a fixed salt and date, an SVG differs each time it is written.
    with rc_context({"svg.hashsalt": "iiet"}):
        for kind in kinds:
            path = stem.with_name(f"{stem.name}.{kind}")
            figure.savefig(path, metadata={"Date": None} if kind == "svg" else {"Software": None})
            paths.append(path)
    return paths
