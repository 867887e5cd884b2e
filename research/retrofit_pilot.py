"""`python research/retrofit_pilot.py`: table and verdict of the pilot in `retrofit.md`.

In: `retrofit_pilot.json`, which `iiet-orch evaluate plain corrected smollm2 --json` printed. Out:
the part of the page between its two comments, written anew; a test compares. The rule is that of
the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from retrofit_results import DOES_NOT_PAY, NOT_DECIDED, PAGE, PAYS, with_part

from orchestrator.reporting.sections import markdown_table
from orchestrator.workspace.files import write_text

BEGIN = "<!-- made by `python research/retrofit_pilot.py` -->"
PILOT = Path(__file__).with_suffix(".json")
SOURCE = "smollm2"
PLAIN = "plain"
CORRECTED = "corrected"
TASK = "lookup_4"
LEAST_ANSWERED = 0.243
"""Share of right answers that one of the arms must have, ten points above chance."""
LEAST_GAIN = 0.05
"""Difference of right answers that is worth the corrections."""
MOST_FORGOTTEN = 0.02
"""Bits per byte by which the corrected model may be worse than its source on ordinary text."""


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What was measured."""

    answered: Mapping[str, float]
    """Name of a model -> share of right answers."""
    bits: Mapping[str, float]
    """Name of a model -> bits per byte of ordinary text."""
    gain: float
    """Right answers of the corrected model, minus those of the plain one."""
    gain_low: float
    """Lower end of its 95 % interval over the items."""
    gain_high: float

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> Self:
        """Read what `evaluate --json` printed."""
        metrics = {
            model["name"]: {name: task["metrics"] for name, task in model["tasks"].items()}
            for model in report["models"]
        }
        [difference] = [
            row
            for row in report["differences"]
            if (row["model"], row["against"], row["task"]) == (CORRECTED, PLAIN, TASK)
        ]
        return cls(
            answered={name: of_task[TASK]["acc"] for name, of_task in metrics.items()},
            bits={
                name: of_task["bits_per_byte"]["bits_per_byte"] for name, of_task in metrics.items()
            },
            gain=difference["difference"],
            gain_low=difference["low"],
            gain_high=difference["high"],
        )

    @property
    def verdict(self) -> str:
        """What the rule says: the first of its sentences that holds."""
        if max(self.answered[PLAIN], self.answered[CORRECTED]) < LEAST_ANSWERED:
            return NOT_DECIDED
        has_forgotten = self.bits[CORRECTED] > self.bits[SOURCE] + MOST_FORGOTTEN
        if self.gain_low > 0 and not has_forgotten:
            return PAYS
        return DOES_NOT_PAY if has_forgotten or self.gain_high < LEAST_GAIN else NOT_DECIDED

    def markdown(self) -> str:
        """Return a table of the models, and the verdict."""
        names = {SOURCE: "`smollm2`, as it was", PLAIN: "`plain`", CORRECTED: "`corrected`"}
        rows = [
            [text, f"{100 * self.answered[name]:.1f}", f"{self.bits[name]:.3f}"]
            for name, text in names.items()
        ]
        table = markdown_table(["model", "right answers %", "bits per byte"], rows)
        interval = f"{100 * self.gain_low:+.1f} to {100 * self.gain_high:+.1f}"
        return (
            f"{table}\n\n`corrected` minus `plain`: {100 * self.gain:+.1f} points ({interval}). "
            f"By the rule: **{self.verdict}**."
        )


def filled(page: str) -> str:
    """Return the page with the pilot's part written anew."""
    pilot = Pilot.read(json.loads(PILOT.read_text("utf-8")))
    return with_part(page, BEGIN, pilot.markdown())


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text("utf-8")))
