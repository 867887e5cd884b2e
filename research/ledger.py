"""The measured numbers of README and research/results.md, each with its command and its JSON file.

A page holds them in blocks alone. A block stands between two comments; the first names a table, the
`front.json` of a report that was copied into `research/fronts/`, and the command that made it:

    <!-- front, bits: research/fronts/text.json by `iiet-orch sweep toy` -->
    <!-- end -->

`python research/ledger.py` fills all blocks from their files. A test compares, and looks for
measured numbers outside of blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "research/results.md")
BLOCK = re.compile(
    r"<!-- (?P<table>[\w, ]+): (?P<file>research/[\w./-]+\.json) by (?P<commands>`[^\n>]+`) -->\n"
    r".*?<!-- end -->",
    re.DOTALL,
)
MEASURED = re.compile(r"[0-9] ?%|[0-9] ?ms\b|± ?[0-9]")
"""What a number looks like that was measured."""
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
        time, spread = row["cost/decode_ms_per_token"], row["cost/decode_ms_spread"]
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
        "| claim (3 to 5: of students) | paper | here | verdict |",
        "| --- | ---: | --- | --- |",
    ]
    for claim in report["claims"]:
        unit = " % less overhead" if claim["number"] == 3 else " points"
        paper = "" if claim["paper"] is None else f"{claim['paper']:g}{unit}"
        here = claim["about"] if claim["here"] is None else f"{claim['here']:.1f}{unit}"
        if claim["here"] is not None:
            what = " % kept" if claim["number"] == 3 else ""
            here += f" ({claim['low']:.1f} to {claim['high']:.1f}{what})"
        lines.append(
            f"| {claim['number']} {claim['text']} | {paper} | {here} | {claim['verdict']} |"
        )
    return lines


TABLES: dict[str, Callable[[Report], list[str]]] = {
    "front": accuracy_table,
    "front, bits": bits_table,
    "claims": claims_table,
}


def filled(text: str) -> str:
    """Return a page with all its blocks made from their files."""

    def block(found: re.Match[str]) -> str:
        report = json.loads((ROOT / found["file"]).read_text("utf-8"))
        head = found[0].partition("\n")[0]
        source = f"By {found['commands']}; all numbers are in `{found['file']}`."
        return "\n".join([head, "", *TABLES[found["table"]](report), "", source, "<!-- end -->"])

    return BLOCK.sub(block, text)


def measured_outside(text: str) -> list[str]:
    """Return the lines of a page that have measured numbers outside of blocks."""
    return [line for line in BLOCK.sub("", text).splitlines() if MEASURED.search(line)]


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / name
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
