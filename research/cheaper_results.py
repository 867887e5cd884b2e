"""`python research/cheaper_results.py`: verdicts, tables and pictures of `cheaper.md`, from JSON.

In: what `cheaper_choice.py` and `cheaper_recovery.py` have stored. Out: the part of the page
between its two comments, written anew, which a test compares; and two pictures. The rules are those
of the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cheaper_choice
import cheaper_recovery
import numpy as np
from cheaper_choice import (
    DEFAULT,
    SMALL,
    SMOLLM2,
    WAYS,
    ModelChoices,
    best_way,
    chosen_default,
    read_choices,
)
from cheaper_recovery import (
    BOTH,
    COMPARED,
    CONTINUED,
    NUM_LAYERS,
    NUM_STEPS,
    PRUNED,
    RATES,
    STUDENTS,
    TEXTS,
    Measured,
    Training,
    measured_in,
)
from retrofit_results import NOT_DECIDED, with_part

from orchestrator.records.evaluation import BITS_METRIC
from orchestrator.reporting.charts import Spec, chart_spec, marks, number, save_chart, word
from orchestrator.reporting.sections import bullets, markdown_table
from orchestrator.reporting.statistics import Interval, ItemValues, sum_of_means
from orchestrator.workspace.files import write_text

PAGE = Path(__file__).with_name("cheaper.md")
IMAGES = Path(__file__).with_name("images")
BEGIN = "<!-- made by `python research/cheaper_results.py` -->"
KEEPS = "keeps"
LOSES = "loses"
WITHIN = "within"
BEYOND = "beyond"
KEPT_SHARES = (0.98, 0.95)
"""Shares of the right answers that a student may keep."""
MOST_RATIOS = (1.02, 1.05)
"""Bits per byte of a student over those of the whole model."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Return a mean over sequences with its 95 % interval by Student's t."""
    return sum_of_means([values]).interval()


# Question 1


def choice_part(models: Mapping[str, ModelChoices]) -> list[str]:
    """Return the paragraphs on the choice of layers."""
    parts = ["### Question 1: which layers can go?"]
    shown = measured_models(models)
    if SMOLLM2 in shown:
        parts += [
            "SmolLM2-135M: rise of the bits per byte, by layers left out. "
            f"The whole model needs {_whole_bits(shown[SMOLLM2]):.3f}.",
            _rises_table(shown[SMOLLM2]),
        ]
    if shown:
        rows = [
            [way, *(_score_text(choices, way) for choices in shown.values())] for way in WAYS
        ]  # fmt: skip
        parts += [
            "Scores: the mean rise over all numbers of layers; in brackets that of `loss` its 95 % "
            "interval over sequences, of the others the difference from `loss` with its interval. "
            "The best in bold.",
            markdown_table(["way", *shown], rows),
            "![Rise of the bits per byte by layers left out, a line for each way, a panel for "
            "each model](images/cheaper-choice.png)",
        ]
    missing = [name for name in (SMOLLM2, *SMALL) if name not in shown]
    unfinished = [
        f"`{way}` of {name}"
        for name, choices in shown.items()
        for way in WAYS
        if way not in choices.finished_ways
    ]
    if missing or unfinished:
        parts.append(
            f"Not run to the end: {', '.join([*missing, *unfinished])}. So the rule is not "
            "applied yet, and the default stays."
        )
        return parts
    default = chosen_default(models, mean_interval)
    verb = "stays" if default == DEFAULT else "becomes"
    parts.append(f"By the rule **`{default}` {verb} the default** of `influence` for whole layers.")
    return parts


def measured_models(models: Mapping[str, ModelChoices]) -> dict[str, ModelChoices]:
    """Return the models of which at least the default way is measured, in their order."""
    return {
        name: models[name]
        for name in (SMOLLM2, *SMALL)
        if name in models and DEFAULT in models[name].finished_ways
    }


def _whole_bits(choices: ModelChoices) -> float:
    return choices.bits_per_nat * fmean(choices.nats[""])


def _rises_table(choices: ModelChoices) -> str:
    ways = choices.finished_ways
    rows = []
    for count in choices.counts:
        rises = {way: fmean(choices.rises(way, count)) for way in ways}
        least = min(rises.values())
        cells = [
            f"**{rise:.3f}**" if rise == least else f"{rise:.3f}" for rise in rises.values()
        ]  # fmt: skip
        rows.append([str(count), *cells])
    shown = [NUM_LAYERS - count for count in STUDENTS]
    rows_of_layers = [
        [way, *(", ".join(map(str, choices.left_out[way][str(n)])) for n in shown)]
        for way in ways
    ]  # fmt: skip
    header = ["way", *(f"{n} layers" for n in shown)]
    table = markdown_table(["left out", *ways], rows)
    of_layers = markdown_table(header, rows_of_layers)
    return f"{table}\n\nWhich layers these are, the first being 1:\n\n{of_layers}"


def _score_text(choices: ModelChoices, way: str) -> str:
    if way not in choices.finished_ways:
        return "not finished"
    score = mean_interval(choices.mean_rises(way))
    text = f"{score.value:.3f}"
    if way == best_way(choices):
        text = f"**{text}**"
    if way == DEFAULT:
        return f"{text} ({score.low:.3f} to {score.high:.3f})"
    pairs = zip(choices.mean_rises(way), choices.mean_rises(DEFAULT), strict=True)
    difference = mean_interval([ours - theirs for ours, theirs in pairs])
    return f"{text} ({difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})"


def choice_chart(models: Mapping[str, ModelChoices]) -> Spec:
    """Return the picture of the rises: a panel for each model, a line for each way."""
    panels = []
    for name, choices in models.items():
        points = [
            {"way": way, "count": count, "rise": fmean(choices.rises(way, count))}
            for way in choices.finished_ways
            for count in choices.counts
        ]
        rise_axis = {"type": "symlog", "constant": 0.2, "domainMin": 0}
        encoding = {
            "x": number("count", title="layers left out", axis={"tickMinStep": 1}),
            "y": number("rise", title="rise, bits per byte", scale=rise_axis),
            "color": word("way", sort=[*WAYS], title=None, legend={"orient": "bottom"}),
        }
        line = marks("line", encoding, values=points, strokeWidth=1.6, point=True)
        panels.append({**line, "title": name, "width": 330, "height": 240})
    return chart_spec({"concat": panels, "columns": 2})


# Question 2


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A model of the second question beside the whole model as it was."""

    measured: Measured
    whole: Measured
    bits_per_nat: Mapping[str, float]

    def bits(self, text: str) -> float:
        """Return the bits per byte of a text."""
        return self.bits_per_nat[text] * fmean(self.measured.nats[text])

    def ratio(self, text: str) -> Interval:
        """Return its bits per byte over those of the whole model, with the interval."""
        return _ratio(BITS_METRIC, self.measured.nats[text], self.whole.nats[text])

    @property
    def kept(self) -> Interval:
        """The right answers over those of the whole model, with the interval."""
        return _ratio(
            "acc",
            [float(right) for right in self.measured.is_right],
            [float(right) for right in self.whole.is_right],
        )

    def facts_verdict(self, share: float) -> str:
        """Return whether it keeps a share of the right answers."""
        return KEEPS if self.kept.low > share else LOSES if self.kept.high < share else NOT_DECIDED

    def text_verdict(self, text: str, most: float) -> str:
        """Return whether its bits per byte are within a multiple of the whole model's."""
        ratio = self.ratio(text)
        return WITHIN if ratio.high < most else BEYOND if ratio.low > most else NOT_DECIDED

    @property
    def sentence(self) -> str:
        """What holds of a student."""
        facts = _joined([self.facts_verdict(share) for share in KEPT_SHARES], ("98 %", "95 %"))
        texts = [
            f"{text}: "
            + _joined([self.text_verdict(text, most) for most in MOST_RATIOS], ("2 %", "5 %"))
            for text in TEXTS
        ]
        kept = self.kept
        interval = f"{100 * kept.low:.0f} to {100 * kept.high:.0f} %"
        return (
            f"**{self.measured.training.num_layers} layers**: {100 * kept.value:.0f} % of the "
            f"right answers ({interval}; {facts}); {'; '.join(texts)}."
        )


def _joined(verdicts: Sequence[str], bounds: Sequence[str]) -> str:
    """Return verdicts with their bounds; equal verdicts are said once."""
    if len(set(verdicts)) == 1:
        return f"{verdicts[0]} {' and '.join(bounds)}"
    return ", ".join(
        f"{verdict} {bound}" for verdict, bound in zip(verdicts, bounds, strict=True)
    )  # fmt: skip


def _ratio(metric: str, values: Sequence[float], of_whole: Sequence[float]) -> Interval:
    """Return the ratio of two means over the same items, with its interval over the items."""
    items = ItemValues(metric, np.array([values, of_whole]), np.ones(len(values)))
    share = items.scores([1, 1]).share(0, 1)
    assert share is not None, "the whole model answers something"
    return share


def readings_of(stored: Mapping[str, Any]) -> dict[Training, Reading]:
    """Return what is stored, each model beside the whole one."""
    measured = measured_in(stored)
    whole = measured.get(Training(num_layers=NUM_LAYERS, arm=PRUNED))
    if whole is None:
        return {}
    return {
        training: Reading(measured=result, whole=whole, bits_per_nat=stored["bits_per_nat"])
        for training, result in measured.items()
    }


def at_better_rate(
    readings: Mapping[Training, Reading], piece: str, num_layers: int, arm: str
) -> Reading | None:
    """Return a model at the rate that counts; None if it has not run."""
    steps = NUM_STEPS[piece]
    found = [
        reading
        for training, reading in readings.items()
        if (training.num_layers, training.arm) == (num_layers, arm)
        and (arm in (PRUNED, CONTINUED) or training.num_steps == steps)
        and (arm != CONTINUED or steps < training.num_steps < 2 * steps)
    ]
    return min(found, key=lambda reading: reading.measured.selection_nats, default=None)


def has_both_rates(readings: Mapping[Training, Reading], training: Training) -> bool:
    """Return whether a training has run at both rates."""
    return all(
        Training(**{**vars(training), "rate": rate}) in readings for rate in RATES
    )  # fmt: skip


def recovery_part(stored: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs on students."""
    parts = ["### Question 2: what does a training give back?"]
    readings = readings_of(stored)
    if not readings:
        return [*parts, "Not run."]
    times = stored["times"]
    if times:
        whole_time = times[str(NUM_LAYERS)]["cpu_ms_per_token"]
        rows = [
            [
                count,
                f"{values['num_parameters'] / 1e6:.1f}",
                f"{values['kv_bytes_per_token'] / 1024:.1f}",
                f"{values['cpu_ms_per_token']:.1f}",
                f"{100 * values['cpu_ms_per_token'] / whole_time:.0f} %",
            ]
            for count, values in times.items()
        ]
        header = ["layers", "million parameters", "KiB of cache a token", "CPU ms/token", "of 30"]
        parts.append(markdown_table(header, rows))
        parts.append(
            "![Bits per byte of both texts against CPU time per token, a point for each number "
            "of layers](images/cheaper-recovery.png)"
        )
    for piece in ("short", "long"):
        arms = [*((n, PRUNED) for n in (NUM_LAYERS, *STUDENTS))]
        arms += [(NUM_LAYERS, CONTINUED), *((n, BOTH) for n in STUDENTS)]
        counts = (COMPARED,) if piece == "short" else STUDENTS
        arms += [
            (n, arm)
            for arm in (cheaper_recovery.CROSS_ENTROPY, cheaper_recovery.KL)
            for n in counts
        ]
        shown = {of_arm: at_better_rate(readings, piece, *of_arm) for of_arm in arms}
        trained = [arm for (_, arm), reading in shown.items() if reading and arm != PRUNED]
        if piece == "long" and not trained:
            parts.append("The piece `long` (600 steps) has not run.")
            continue
        rows = [
            _row(readings, reading) if reading else [f"{n}", arm, "not run", *6 * [""]]
            for (n, arm), reading in shown.items()
        ]
        header = [
            "layers", "arm", "rate", *(f"bits per byte, {text}" for text in TEXTS), "right of 32",
            *(f"same token, {text}" for text in TEXTS), "CPU minutes",
        ]  # fmt: skip
        parts += [
            f"Piece `{piece}`, {NUM_STEPS[piece]} steps of 512 tokens. Brackets: change from the "
            "whole model, with the 95 % interval.",
            markdown_table(header, rows),
        ]
        for arm, words in ((PRUNED, "untrained models"), (BOTH, "models trained with both losses")):
            of_arm = [shown[count, arm] for count in STUDENTS]
            sentences = [reading.sentence for reading in of_arm if reading]
            if sentences:
                parts += [f"By the rule, {words}:", bullets(sentences)]
    return parts


def _row(readings: Mapping[Training, Reading], reading: Reading) -> list[str]:
    training = reading.measured.training
    cells = [str(training.num_layers), training.arm, ""]
    if training.num_steps:
        one = "" if has_both_rates(readings, training) else " (the other has not run)"
        cells[2] = f"{training.rate:g}{one}"
    for text in TEXTS:
        ratio = reading.ratio(text)
        change = f" ({100 * ratio.value - 100:+.1f} %, {100 * ratio.low - 100:+.1f} to "
        change += f"{100 * ratio.high - 100:+.1f})"
        is_whole = reading.measured is reading.whole
        cells.append(f"{reading.bits(text):.3f}{'' if is_whole else change}")
    cells.append(str(sum(reading.measured.is_right)))
    cells += [f"{100 * reading.measured.agreement[text]:.1f} %" for text in TEXTS]
    minutes = reading.measured.cpu_seconds / 60
    cells.append(f"{minutes:.1f}" if training.num_steps else "")
    return cells


def recovery_lines(stored: Mapping[str, Any]) -> list[str]:
    """Return the lines of the front page's table: what a model of fewer layers loses and gains.

    Columns of trained models are there once one is trained.
    """
    readings = readings_of(stored)
    header = ["layers", "million parameters", "CPU ms per token"]
    header += [*(f"{text}, untrained" for text in TEXTS), "right of 32, untrained"]
    by_count: dict[int, list[str]] = {}
    for count in (NUM_LAYERS, *STUDENTS):
        times = stored["times"][str(count)]
        by_count[count] = [
            str(count),
            f"{times['num_parameters'] / 1e6:.0f}",
            f"{times['cpu_ms_per_token']:.0f}",
            *_front_page_cells(at_better_rate(readings, "short", count, PRUNED)),
        ]
    trained = {
        count: at_better_rate(readings, "short", count, BOTH if count < NUM_LAYERS else CONTINUED)
        for count in by_count
    }
    if any(trained.values()):
        header += [*(f"{text}, trained" for text in TEXTS), "right of 32, trained", "CPU minutes"]
        for count, reading in trained.items():
            minutes = f"{reading.measured.cpu_seconds / 60:.0f}" if reading else ""
            by_count[count] += [*_front_page_cells(reading), minutes]
    return markdown_table(header, [*by_count.values()]).splitlines()


def _front_page_cells(reading: Reading | None) -> list[str]:
    if reading is None:
        return ["not run", *len(TEXTS) * [""]]
    bits = [f"{reading.bits(text):.2f}" for text in TEXTS]
    return [*bits, str(sum(reading.measured.is_right))]


SERIES = {
    PRUNED: "layers left out, no training",
    BOTH: "distilled",
    CONTINUED: "original, trained further",
}
"""Arm of a training -> its name in the picture."""
ORIGINAL = "original"
PANELS = {
    "documentation": "documentation, which is trained on",
    "help topics": "another text: help topics",
}
"""Text -> title of its panel."""


def recovery_chart(readings: Mapping[Training, Reading], times: Mapping[str, Any]) -> Spec:
    """Return the front: bits per byte of both texts against CPU time per token."""
    panels = []
    for text in TEXTS:
        points = []
        for arm, name in SERIES.items():
            for count in (NUM_LAYERS, *STUDENTS):
                reading = at_better_rate(readings, "short", count, arm)
                if reading is not None:
                    is_original = count == NUM_LAYERS and arm == PRUNED
                    points.append(
                        {
                            "model": ORIGINAL if is_original else name,
                            "layers": f"{count} layers" if is_original else str(count),
                            "ms": times[str(count)]["cpu_ms_per_token"],
                            "bits": reading.bits(text),
                        }
                    )
        encoding = {
            "x": number("ms", title="CPU milliseconds per token", scale={"zero": False}),
            "y": number("bits", title="bits per byte", scale={"zero": False}),
            "color": word(
                "model",
                title=None,
                sort=[ORIGINAL, *SERIES.values()],
                legend={"orient": "bottom", "labelLimit": 0},
            ),
        }
        names = {**encoding, "text": word("layers")}
        # Names of trained models are below their points, so that they do not meet the others.
        trained = (
            "datum.model == '"
            + "' || datum.model == '".join((SERIES[BOTH], SERIES[CONTINUED]))
            + "'"
        )
        panels.append(
            {
                "title": PANELS[text],
                "width": 300,
                "height": 240,
                "data": {"values": points},
                "layer": [
                    marks("line", encoding, point=True, strokeWidth=1.6),
                    marks("text", names, where=[{"filter": f"!({trained})"}], dy=-10),
                    marks("text", names, where=[{"filter": trained}], dy=12),
                ],
            }
        )
    return chart_spec({"hconcat": panels})


def stored_recovery(file: Path = cheaper_recovery.RESULTS) -> dict[str, Any]:
    """Return the object of the second script's results file; without a file, an empty one."""
    if not file.is_file():
        return {"models": [], "times": {}}
    stored: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return stored


def stored_choices(file: Path = cheaper_choice.RESULTS) -> dict[str, ModelChoices]:
    """Return what the first script has stored; without a file, nothing."""
    return read_choices(file) if file.is_file() else {}


def filled(page: str, choices: Mapping[str, ModelChoices], recovery: Mapping[str, Any]) -> str:
    """Return the page with its results written anew."""
    parts = [*choice_part(choices), *recovery_part(recovery)]
    parts += ["### Question 3: is a correction worth a layer?", "Not run."]
    return with_part(page, BEGIN, "\n\n".join(part.strip() for part in parts))


def main() -> None:
    """Write the page and its pictures."""
    choices = stored_choices()
    recovery = stored_recovery()
    write_text(PAGE, filled(PAGE.read_text("utf-8"), choices, recovery))
    if shown := measured_models(choices):
        save_chart(choice_chart(shown), IMAGES / "cheaper-choice", formats=["png"])
    readings = readings_of(recovery)
    if readings and recovery["times"]:
        chart = recovery_chart(readings, recovery["times"])
        save_chart(chart, IMAGES / "cheaper-recovery", formats=["png"])


if __name__ == "__main__":
    main()
