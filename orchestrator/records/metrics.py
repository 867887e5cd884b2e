"""The metrics of a model: what each is called, how it is written, and which way is better.

Options, tables, charts, sentences and MLflow's pages all read `METRICS`. A metric of a single task,
such as `quality/lastword/acc`, is not in it: `metric_of` tells what it is from the end of its name.
Names that are put together from others, such as that of a standard error, are made by the functions
at the end of this file; each kind by one function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.terminal.render import format_bytes, format_parameters

CostName = Literal["nfe", "flops", "ms", "kv", "evaluations"]
"""Values of the option `--cost`; a test compares them with the table."""
QualityName = Literal["accuracy", "bits", "perplexity", "loss"]
"""Values of the option `--quality`."""

COST = "cost/"
QUALITY = "quality/"
PAIRED = "paired/"
"""How the names of a group begin: costs, qualities, and what is drawn over the items that all
models of a front answered."""
STDERR_SUFFIX = "_stderr"
"""End of the name of a standard error, as lm-eval has it."""

NFE = "cost/evaluations"
RELATIVE_NFE = "cost/relative_evaluations"
FLOPS = "cost/flops_per_token"
RELATIVE_FLOPS = "cost/relative_flops"
DECODE_MS = "cost/decode_ms_per_token"
DECODE_MS_SPREAD = "cost/decode_ms_spread"
KV_BYTES = "cost/kv_bytes_per_token"
NUM_PARAMETERS = "cost/num_parameters"
TRAINING_TOKENS = "train/tokens"
"""Tokens that a model was trained on."""
OVERHEAD_NFE = "cost/overhead_evaluations"
OVERHEAD_NFE_SHARE = "cost/overhead_share"
OVERHEAD_MS = "cost/overhead_ms_per_token"
OVERHEAD_MS_SHARE = "cost/overhead_ms_share"
ACCURACY = "quality/accuracy"
BITS_PER_BYTE = "quality/bits_per_byte"
VALIDATION_LOSS = "quality/validation_loss"
"""Mean loss over held-out tokens, measured after the training. During a training, its journal has
`validation/loss`, over as many tokens as the recipe says."""
PERPLEXITY = "quality/perplexity"
PAIRED_SHARE_OF_FULL = "paired/share_of_full"
CONFIDENCE_KEEPS_99 = "paired/confidence_keeps_99"
CONFIDENCE_ON_FRONT = "paired/confidence_on_front"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that is known of a model."""

    name: str
    """Tracked name, in files and in MLflow."""
    options: tuple[CostName | QualityName, ...] = ()
    """Values of `--cost` or `--quality` that mean it; the last one stands in folders' names."""
    title: str
    """Title of an axis."""
    column: str = ""
    """Heading of a column; the title if it is empty."""
    noun: str = ""
    """What a sentence calls it, as in `at half of its NFE`; the title if it is empty."""
    unit: str = ""
    """What stands behind its number in a sentence."""
    format: Callable[[float], str] = "{:.4g}".format
    """Writes its number in a table."""
    is_percent: bool = False
    """Whether it is a share, which is written in percent."""
    higher_is_better: bool = False
    counted_as: str = ""
    """Field of `iiet.cost.InferenceCost` that it is; empty if it does not follow from the shape."""

    @property
    def heading(self) -> str:
        """Heading of its column in a table."""
        return self.column or self.title


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name=NFE,
            options=("evaluations", "nfe"),
            title="NFE per token",
            column="NFE",
            noun="NFE",
            unit="NFE",
            format="{:g}".format,
            counted_as="evaluations_per_token",
        ),
        Metric(name=RELATIVE_NFE, title="NFE, share of the full model's", is_percent=True),
        Metric(
            name=FLOPS,
            options=("flops",),
            title="FLOPs per token",
            column="FLOPs/token",
            noun="FLOPs",
            counted_as="decode_flops_per_token",
        ),
        Metric(
            name=RELATIVE_FLOPS,
            title="FLOPs per token, share of the full model's",
            column="FLOPs",
            format="{:.0%}".format,
            is_percent=True,
        ),
        Metric(
            name="cost/prefill_flops_per_token",
            title="FLOPs per token of a prompt",
            counted_as="prefill_flops_per_token",
        ),
        Metric(
            name=DECODE_MS,
            options=("ms",),
            title="Decoding, ms per token",
            column="ms/token",
            noun="decoding time",
            unit="ms",
            format="{:.2f}".format,
        ),
        Metric(
            name=KV_BYTES,
            options=("kv",),
            title="KV cache, bytes per token",
            column="KV/token",
            noun="key/value cache",
            unit="bytes",
            format=format_bytes,
            counted_as="kv_bytes_per_token",
        ),
        Metric(
            name="cost/weight_bytes_per_token",
            title="Weights read, bytes per token",
            format=format_bytes,
            counted_as="weight_bytes_per_token",
        ),
        Metric(
            name=NUM_PARAMETERS,
            title="Parameters",
            column="parameters",
            format=format_parameters,
            counted_as="num_parameters",
        ),
        Metric(
            name=OVERHEAD_NFE,
            title="Overhead: NFE beyond vanilla",
            column="+NFE",
            unit="NFE",
            format="{:g}".format,
        ),
        Metric(
            name=OVERHEAD_NFE_SHARE,
            title="Overhead in NFE, share of the teacher's",
            column="overhead",
            format="{:.0%}".format,
            is_percent=True,
        ),
        Metric(
            name=OVERHEAD_MS,
            title="Overhead: ms per token beyond vanilla",
            column="+ms",
            unit="ms",
            format="{:.2f}".format,
        ),
        Metric(
            name=OVERHEAD_MS_SHARE,
            title="Overhead in ms, share of the teacher's",
            format="{:.0%}".format,
            is_percent=True,
        ),
        Metric(
            name=ACCURACY,
            options=("accuracy",),
            title="Accuracy",
            column="accuracy %",
            is_percent=True,
            higher_is_better=True,
        ),
        Metric(
            name=BITS_PER_BYTE,
            options=("bits",),
            title="Bits per byte",
            column="bits/byte",
            format="{:.3f}".format,
        ),
        Metric(name=PERPLEXITY, options=("perplexity",), title="Perplexity of a token"),
        Metric(
            name=VALIDATION_LOSS,
            options=("loss",),
            title="Validation loss, nats per token",
            column="loss",
        ),
        Metric(name=CONFIDENCE_KEEPS_99, title="Confidence: keeps 99%", higher_is_better=True),
        Metric(name=CONFIDENCE_ON_FRONT, title="Confidence: on the front", higher_is_better=True),
    )
}
"""Tracked name -> metric."""


def _by_option(group: str) -> dict[str, str]:
    return {
        option: name
        for name, metric in METRICS.items()
        if name.startswith(group)
        for option in metric.options
    }


COSTS = _by_option(COST)
"""Value of the option `--cost` -> tracked name."""
QUALITIES = _by_option(QUALITY)
"""Value of the option `--quality` -> tracked name."""
BUDGET_METRICS = {
    "evaluations": NFE,
    "flops": FLOPS,
    "kv": KV_BYTES,
    "parameters": NUM_PARAMETERS,
}
"""Unit of a budget -> tracked name."""
OVERHEADS = {
    NFE: (OVERHEAD_NFE, OVERHEAD_NFE_SHARE),
    DECODE_MS: (OVERHEAD_MS, OVERHEAD_MS_SHARE),
}
"""Cost -> what a model costs beyond vanilla of its shape, and a student as a share of its
teacher's."""
OVERHEAD_METRICS = tuple(name for names in OVERHEADS.values() for name in names)

_ENDS_OF_SHARES = ("accuracy", "/acc", "/acc_norm")
_ENDS_OF_LOSSES = ("loss", "bits_per_byte", "perplexity", "ppl", "error")


def metric_of(name: str) -> Metric:
    """Return the metric of a tracked name; that of a single task by the end of its name."""
    if name in METRICS:
        return METRICS[name]
    return Metric(
        name=name,
        title=name.partition("/")[2] or name,
        is_percent=name.endswith(_ENDS_OF_SHARES),
        higher_is_better=not name.endswith(_ENDS_OF_LOSSES),
    )


# Names that are put together


def quality_name(measured: str) -> str:
    """Return the tracked name of a quality: `quality/accuracy`, `quality/TASK/METRIC`."""
    return QUALITY + measured


def stderr_name(metric: str) -> str:
    """Return the name of a metric's standard error: `quality/accuracy_stderr`."""
    return metric + STDERR_SUFFIX


def interval_end_names(metric: str) -> tuple[str, str]:
    """Return the names of both ends of an interval: `paired/share_of_full_low` and `..._high`."""
    return f"{metric}_low", f"{metric}_high"


def difference_names(others: Iterable[str]) -> dict[str, str]:
    """Return label of another model -> last part of the tracked names of differences to it, as in
    `paired/vs_vanilla`, and of a task in `paired/lastword/vs_vanilla`.

    MLflow takes no spaces or signs; of labels that differ in these alone, the later ones get a
    number.
    """
    names: dict[str, str] = {}
    for label in others:
        plain_name = f"vs_{re.sub('[^0-9A-Za-z]+', '_', label).strip('_')}"
        name = plain_name
        number = 1
        while name in names.values():
            number += 1
            name = f"{plain_name}_{number}"
        names[label] = name
    return names


def confidence_keeps_name(demanded_share: float) -> str:
    """Return the tracked name of the confidence that a model keeps a share of the full model's
    quality: `paired/confidence_keeps_99`."""
    return f"{PAIRED}confidence_keeps_{100 * demanded_share:.4g}"


def timed_name(number: str, *, batch_size: int, context: int) -> str:
    """Return the tracked name of what `benchmark` measured: `cost/batch_1_context_64/decode_ms`."""
    return f"{COST}batch_{batch_size}_context_{context}/{number}"


def pick_name(pick: str, number: str) -> str:
    """Return the name of a number of a picked model in a sweep's run: `front/knee_cost`."""
    return f"front/{pick}_{number}"


def claim_name(claim: str) -> str:
    """Return the name of a claim of the paper in a sweep's run: `claims/iiet_over_vanilla`."""
    return f"claims/{claim}"
