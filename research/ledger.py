"""The measured numbers of README and research/results.md, each with its command and its JSON file,
and two pictures of fronts.

A page holds them in blocks alone. A block stands between two comments; the first names a table, the
`front.json` of a report that was copied into `research/fronts/`, and the command that made it. A
table of several files, which may also be those of studies, has a command in each row:

    <!-- front, bits: research/fronts/text.json by `iiet-orch sweep toy` -->
    <!-- end -->
    <!-- holds: research/fronts/claims.json, research/retrofit_study.json -->
    <!-- end -->

`python research/ledger.py` fills all blocks from their files, and draws the README's picture of
SmolLM2 with fewer layers and the front page's two fronts of corrections. A test compares, and looks
for measured numbers outside of blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optimizer_study
import vl_convert
from cheaper_recovery import BOTH, PRUNED, TEXTS
from cheaper_results import (
    BEYOND,
    MOST_RATIOS,
    WITHIN,
    at_better_rate,
    readings_of,
    recovery_chart,
    recovery_lines,
)
from retrofit_pilot import Pilot
from retrofit_results import DOES_NOT_PAY, NOT_DECIDED, PAYS, Readings, all_readings
from retrofit_study import CONTINUED, Study, results_in

from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import (
    PIXELS_PER_UNIT,
    Spec,
    front_chart,
    front_legend,
    save_chart,
)
from orchestrator.reporting.claims import PAPER_SHARE_OF_FULL
from orchestrator.reporting.front import find_front
from orchestrator.reporting.results import model_results

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "research/results.md")
BLOCK = re.compile(
    r"<!-- (?P<table>[\w, ]+): (?P<files>research/[\w./, -]+\.json)"
    r"( by (?P<commands>`[^\n>]+`))? -->\n"
    r".*?<!-- end -->",
    re.DOTALL,
)
MEASURED = re.compile(r"[0-9] ?%|[0-9] ?ms\b|± ?[0-9]")
"""What a number looks like that was measured."""
PICTURE = ROOT / "docs" / "images" / "fronts.png"
CHEAPER_PICTURE = ROOT / "docs" / "images" / "cheaper-front"
PICTURED = {
    "demo": "From random weights: three hops, iiet-orch quickstart",
    "retrofit": "From a plain Llama: five hops, iiet-orch sweep retrofit",
}
"""Name of a report in `research/fronts/` -> title of its front, from top to bottom."""
NOT_PICTURED = ("source_continued, equal tokens", "scratch")
"""Controls that had fewer steps than those of the same kind, whose names would cover theirs."""
PANEL = (500, 215)
"""Width and height of a front in pixels: small, so that its letters can be read on a phone."""
UNKNOWN = "not measured"
WORDS = {PAYS: "holds", DOES_NOT_PAY: "does not hold", NOT_DECIDED: "not decided", "": UNKNOWN}
"""Verdict of the study of retrofits, empty if it has not run -> the word for it here."""
SHOWN_LAYERS = 27
"""Layers of the student of SmolLM2 that the table names."""
STARTS = ("mean", "identity")
"""Kinds of start of a retrofit."""
Report = Mapping[str, Any]


def accuracy_table(report: Report) -> list[str]:
    """Return the lines of a front of accuracy against cost."""
    return _front(report, "accuracy %", "quality/accuracy", lambda value: f"{100 * value:.1f}")


def bits_table(report: Report) -> list[str]:
    """Return the lines of a front of bits per byte against cost."""
    return _front(report, "bits per byte", "quality/bits_per_byte", lambda value: f"{value:.3f}")


def _front(report: Report, title: str, quality: str, text: Callable[[float], str]) -> list[str]:
    kept = {row["name"]: row["share_of_full"] for row in report["results"]}
    marks = {report["picks"][name]: name for name in ("best", "knee", "cheapest")}
    lines = [
        f"| model | NFE | ms/token | {title} | of full | front |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["results"]:
        error = row.get(f"{quality}_stderr")
        time = row["cost/decode_ms_per_token"]
        spread = row["cost/decode_ms_spread"]
        cells = [
            row["name"],
            f"{row['cost/evaluations']:g}",
            f"{time:.2f} ± {spread:.2f}",
            text(row[quality]) + (f" ± {text(error)}" if error else ""),
            f"{100 * kept[row['name']]:.1f} %",
            marks.get(row["key"], "yes" if row["on_front"] else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def claims_table(report: Report) -> list[str]:
    """Return the lines of the paper's claims."""
    lines = [
        "| claim (3 to 5: of students) | paper | here | 95 % interval | verdict |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    return [*lines, *(f"| {' | '.join(_claim_cells(claim))} |" for claim in report["claims"])]


def _claim_cells(claim: Report) -> list[str]:
    text = f"{claim['number']} {claim['text']}"
    if claim["kept"] is not None:
        # The claim is about what is kept; the overhead says of which student.
        text += f" ({claim['here']:.1f} % less overhead; the paper {claim['paper']:g} %)"
        paper = f"{100 * PAPER_SHARE_OF_FULL:.1f} % kept"
        here = f"{claim['kept']:.1f} % kept"
        interval = f"{claim['kept_low']:.1f} to {claim['kept_high']:.1f} %"
    else:
        paper = "" if claim["paper"] is None else f"{claim['paper']:g} points"
        here = f"{claim['here']:.1f} points"
        interval = f"{claim['low']:.1f} to {claim['high']:.1f}"
    return [text, paper, here, interval, claim["verdict"]]


@dataclass(frozen=True)
class Question:
    """What was asked, and the answer for each kind of task.

    Attributes:
        short: The question in at most five words; empty where the README leaves it out.
        text: The whole question.
        on_tasks: The answer on tasks of serial steps.
        on_text: The answer on text.
        on_published: The answer for a Hugging Face model.
        with_muon: For which optimizers it holds.
        commands: What measures it.
    """

    short: str
    text: str
    on_tasks: str
    on_text: str
    on_published: str
    with_muon: str
    commands: str


def questions(
    claims: Report,
    text: Report,
    retrofit: Report,
    study: Report,
    pilot: Report,
    optimizers: Report,
    cheaper: Report,
) -> list[Question]:
    """Return what was asked, with the answers that the files give.

    Args:
        claims: Front of `sweep claims`.
        text: Front of `sweep toy`.
        retrofit: Front of `sweep retrofit`.
        study: Stored trainings of `research/retrofit_study.py`.
        pilot: Evaluation of the pilot with SmolLM2.
        optimizers: Stored trainings of `research/optimizer_study.py`.
        cheaper: Stored models of `research/cheaper_recovery.py`.
    """
    by_key = {claim["key"]: claim for claim in claims["claims"]}
    cheapest = text["picks"]["cheapest"]
    [student] = [row["name"] for row in text["results"] if row["key"] == cheapest]
    paper = "`iiet-orch sweep claims`, `iiet-orch sweep toy`"
    shipped = "`iiet-orch sweep retrofit`"
    studied = "`python research/retrofit_study.py`"
    piloted = "a pilot ([retrofit.md](retrofit.md))"
    *depth_readings, text_readings = all_readings(_stored_study(study))
    with_muon = optimizer_study.Study(Path("unused"), Path("unused"))
    with_muon.measured = optimizer_study.results_in(optimizers)
    not_tried = optimizer_study.NOT_TRIED
    return [
        Question(
            "IIET beats plain Llama",
            "IIET beats a plain Llama of its size (vanilla)",
            _claim_cell(by_key["iiet_over_vanilla"]),
            _difference_cell(text, "teacher", "vs_vanilla"),
            UNKNOWN,
            _optimizers_cell(with_muon, optimizer_study.VANILLA),
            paper,
        ),
        Question(
            "IIET beats r = 0",
            "it beats an IIET that was trained without corrections (r = 0)",
            _difference_cell(claims, "r = 3", "vs_r_0"),
            _difference_cell(text, "teacher", "vs_r_0"),
            UNKNOWN,
            _optimizers_cell(with_muon, optimizer_study.MIX),
            paper,
        ),
        Question(
            "students keep 99.4 % quality",
            "a student with fewer corrections keeps 99.4 % of its quality",
            _claim_cell(by_key["saved_overhead_nfe"]),
            _kept_cell(text, student),
            UNKNOWN,
            not_tried,
            paper,
        ),
        Question(
            "student beats equal-cost vanilla",
            "at vanilla's cost, a student beats vanilla",
            _claim_cell(by_key["student_over_vanilla_nfe"]),
            _difference_cell(text, student, "vs_vanilla"),
            UNKNOWN,
            not_tried,
            paper,
        ),
        Question(
            "corrections beat further training",
            "a plain model with corrections beats itself, fine-tuned without them for equal FLOPs",
            _difference_cell(retrofit, "teacher", "vs_source_continued"),
            _reading_cell(text_readings),
            _pilot_cell(Pilot.read(pilot)),
            not_tried,
            f"{shipped}, {studied}, {piloted}",
        ),
        Question(
            "",
            "the same under three seeds, at other depths, and with both kinds of start",
            _verdicts_cell(depth_readings),
            _verdicts_cell([text_readings]),
            UNKNOWN,
            not_tried,
            studied,
        ),
        Question(
            "",
            "at the plain model's cost, a student beats it, fine-tuned",
            _difference_cell(retrofit, "0,0", "vs_source_continued"),
            UNKNOWN,
            UNKNOWN,
            not_tried,
            shipped,
        ),
        Question(
            f"{SHOWN_LAYERS} of 30 layers suffice",
            f"with {SHOWN_LAYERS} of 30 layers, a plain model is within 5 % of its bits per byte",
            UNKNOWN,
            UNKNOWN,
            _fewer_layers_cell(cheaper),
            not_tried,
            "`python research/cheaper_recovery.py`",
        ),
    ]


def places_table(*reports: Report) -> list[str]:
    """Return the lines of all questions, with intervals and commands, from files of `questions`."""
    lines = [
        "| does it hold that | on tasks of serial steps | on text | for a Hugging Face model "
        "| with Muon, too | by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for asked in questions(*reports):
        answers = (asked.on_tasks, asked.on_text, asked.on_published)
        lines.append(f"| {' | '.join([asked.text, *answers, asked.with_muon, asked.commands])} |")
    return lines


def summary_table(*reports: Report) -> list[str]:
    """Return the lines of the README's questions, with verdicts and numbers alone."""
    lines = [
        "| does it hold that | serial-step tasks | text | Hugging Face model |",
        "| --- | --- | --- | --- |",
    ]
    for asked in questions(*reports):
        if asked.short:
            answers = (asked.on_tasks, asked.on_text, asked.on_published)
            lines.append(f"| {' | '.join([asked.short, *map(short_answer, answers)])} |")
    return lines


def short_answer(answer: str) -> str:
    """Return the verdict and the number of an answer, without interval and explanation."""
    verdict, _, rest = answer.replace("**", "").partition(": ")
    number = rest.partition(" (")[0].replace("bits per byte", "bits/byte")
    return f"{verdict}: {number}" if re.match(r"[-+]?\d", number) else verdict


def _optimizers_cell(study: optimizer_study.Study, other: str) -> str:
    """Return for which optimizers an IIET with corrections beats another arm at equal FLOPs."""
    holds_for = {
        place: optimizer_study.which_optimizers(
            {
                optimizer: study.verdict(task, optimizer_study.CORRECTED, other, optimizer)
                for optimizer in optimizer_study.OPTIMIZERS
            }
        )
        for place, task in (("tasks", "depth"), ("text", "text"))
    }
    if set(holds_for.values()) == {optimizer_study.NOT_TRIED}:
        return optimizer_study.NOT_TRIED
    return ", ".join(f"on {place}: {words}" for place, words in holds_for.items())


def _claim_cell(claim: Report) -> str:
    _, _, here, interval, verdict = _claim_cells(claim)
    return f"**{verdict}**: {here} ({interval}, over {claim['over']})"


def _kept_cell(report: Report, name: str) -> str:
    """Return the third claim for a student, by the quality of the report's front."""
    [row] = [row for row in report["results"] if row["name"] == name]
    low = row["paired/share_of_full_low"]
    high = row["paired/share_of_full_high"]
    _, verdict_of_teacher = difference_cells(report, "teacher", "vs_r_0")
    if verdict_of_teacher != "holds":
        return "**says nothing**: the teacher does not beat r = 0"
    verdict = "holds" if low >= PAPER_SHARE_OF_FULL else "not decided"
    kept = 100 * row["paired/share_of_full"]
    interval = f"{100 * low:.1f} to {100 * high:.1f} %, over {_over(report)}"
    return f"**{verdict}**: {kept:.1f} % kept ({interval})"


def _difference_cell(report: Report, name: str, against: str) -> str:
    difference, verdict = difference_cells(report, name, against)
    return f"**{verdict}**: {difference}"


def _stored_study(stored: Report) -> Study:
    study = Study(Path("unused"), Path("unused"))
    study.measured = results_in(stored)
    return study


def _reading_cell(reading: Readings) -> str:
    difference = reading.difference(reading.of_arm(STARTS[0]), reading.of_arm(CONTINUED))
    interval = difference.interval
    unit = "bits per byte" if reading.is_text else "points"
    here = _with_interval(interval.value, interval.low, interval.high, unit, interval.over)
    return f"**{WORDS[difference.verdict(reading.least)]}**: {here}"


def _pilot_cell(pilot: Pilot) -> str:
    word = WORDS[pilot.verdict]
    numbers = (100 * pilot.gain, 100 * pilot.gain_low, 100 * pilot.gain_high)
    here = _with_interval(*numbers, "points", "items of one seed")
    return f"**{word}**: {here} in one pilot"


def _fewer_layers_cell(stored: Report) -> str:
    """Return what a student loses of the text that no model was trained on, trained if it is."""
    readings = readings_of(stored)
    trained = at_better_rate(readings, "short", SHOWN_LAYERS, BOTH)
    reading = trained or at_better_rate(readings, "short", SHOWN_LAYERS, PRUNED)
    if reading is None:
        return UNKNOWN
    verdict = reading.text_verdict(TEXTS[1], MOST_RATIOS[1])
    word = {WITHIN: "holds", BEYOND: "does not hold"}.get(verdict, verdict)
    ratio = reading.ratio(TEXTS[1])
    rise, low, high = (100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high))
    state = f"after {reading.measured.training.num_steps} steps" if trained else "untrained"
    return f"**{word}**: {rise:+.1f} % ({low:+.1f} to {high:+.1f}), {state}"


def _verdicts_cell(readings: Sequence[Readings]) -> str:
    """Return how often a retrofit beats its source, trained on, as "**holds** in 1 of 12"."""
    verdicts = [
        reading.difference(reading.of_arm(start), reading.of_arm(CONTINUED)).verdict(reading.least)
        for reading in readings
        for start in STARTS
    ]
    return ", ".join(
        f"**{word}** in {verdicts.count(verdict)} of {len(verdicts)}"
        for verdict, word in WORDS.items()
        if verdict in verdicts
    )


def difference_cells(report: Report, name: str, against: str) -> list[str]:
    """Return how much better a model is than another, with the 95 % interval, and what follows."""
    [row] = [row for row in report["results"] if row["name"] == name]
    is_accuracy = report["axes"]["quality"] == "quality/accuracy"
    factor, unit = (100, "points") if is_accuracy else (-1, "bits per byte")
    better = factor * row[f"paired/{against}"]
    low, high = sorted(factor * row[f"paired/{against}_{end}"] for end in ("low", "high"))
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "not decided"
    return [_with_interval(better, low, high, unit, _over(report)), verdict]


def _over(report: Report) -> str:
    return "seeds and items" if report["confidence_basis"]["num_seeds"] > 1 else "items of one seed"


def _with_interval(difference: float, low: float, high: float, unit: str, over: str) -> str:
    digits = 1 if unit == "points" else 3
    return f"{difference:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f}, over {over})"


TABLES: dict[str, Callable[..., list[str]]] = {
    "front": accuracy_table,
    "front, bits": bits_table,
    "claims": claims_table,
    "holds": places_table,
    "summary": summary_table,
    "cheaper": recovery_lines,
}
"""Name of a table -> the function that makes it of its reports."""


def filled(text: str) -> str:
    """Return a page with all its blocks made from their files."""

    def block(found: re.Match[str]) -> str:
        files = found["files"].split(", ")
        reports = [json.loads((ROOT / file).read_text("utf-8")) for file in files]
        head = found[0].partition("\n")[0]
        command = f"By {found['commands']}; all" if found["commands"] else "All"
        source = f"{command} numbers are in {', '.join(f'`{file}`' for file in files)}."
        lines = TABLES[found["table"]](*reports)
        return "\n".join([head, "", *lines, "", source, "<!-- end -->"])

    return BLOCK.sub(block, text)


def measured_outside(text: str) -> list[str]:
    """Return the lines of a page that have measured numbers outside of blocks."""
    return [line for line in BLOCK.sub("", text).splitlines() if MEASURED.search(line)]


def panels() -> list[Spec]:
    """Return the charts of the picture, from top to bottom; the last one has the legend of all."""
    charts = []
    for name, title in PICTURED.items():
        report = json.loads((ROOT / "research" / "fronts" / f"{name}.json").read_text("utf-8"))
        # The details of a model lack its suite, which no chart shows.
        rows = [{**row["details"], "suite": Suite()} for row in report["results"]]
        trials = [Trial.model_validate(row) for row in rows if row["label"] not in NOT_PICTURED]
        width, height = PANEL
        front = find_front(model_results(trials))
        chart = front_chart(front, height=height)
        heading = {"text": title}
        if not charts:  # The panels have their legend in common.
            heading["subtitle"] = front_legend(front)
        charts.append({**chart, "width": width, "title": heading})
    for chart in charts[:-1]:
        for layer in chart["layer"]:
            for channel in {"color", "shape"} & layer["encoding"].keys():
                layer["encoding"][channel] = {**layer["encoding"][channel], "legend": None}
    return charts


def draw_picture(path: Path) -> None:
    """Draw the fronts of `panels` below each other."""
    width = 0.0
    height = 0.0
    parts = []
    for chart in panels():
        svg: str = vl_convert.vegalite_to_svg(chart)
        size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
        assert size
        parts.append(svg.replace("<svg ", f'<svg y="{height:g}" ', 1))
        width = max(width, float(size[1]))
        height += float(size[2])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}">'
    whole = "\n".join([head, *parts, "</svg>"])
    path.write_bytes(vl_convert.svg_to_png(whole, scale=PIXELS_PER_UNIT))


def draw_cheaper_front(stem: Path) -> None:
    """Draw what SmolLM2 loses with fewer layers, against its time per token, as a PNG."""
    stored = json.loads((ROOT / "research" / "cheaper_recovery.json").read_text("utf-8"))
    save_chart(recovery_chart(readings_of(stored), stored["times"]), stem, formats=["png"])


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / name
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    draw_picture(PICTURE)
    draw_cheaper_front(CHEAPER_PICTURE)
