"""The report of all sections, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.finding import Figure, Finding, SectionResult
from orchestrator.reporting.markdown import bullets, markdown_table

Facts = dict[str, Any]


def to_dict(results: Sequence[SectionResult], facts: Facts) -> dict[str, Any]:
    """Return plain JSON values; a figure that is not finite is a string."""
    sections = [
        {**asdict(result), "status": result.status, "problems": result.problems}
        for result in results
    ]
    for finding in (finding for section in sections for finding in section["findings"]):
        finding["figures"] = {
            name: value if isinstance(value, str) or math.isfinite(value) else str(value)
            for name, value in finding["figures"].items()
        }
    return {"machine": facts, "sections": sections}


def to_markdown(results: Sequence[SectionResult], facts: Facts) -> str:
    """Return the report: facts, one table of verdicts, then a table for each section."""
    parts = [
        f"# GPU report: {facts['name']}",
        bullets(f"{name}: {value}" for name, value in facts.items()),
        _verdicts(results),
        *(_section(result) for result in results),
    ]
    return "\n\n".join(parts) + "\n"


def _verdicts(results: Sequence[SectionResult]) -> str:
    rows = [
        [
            f"[{result.name}](#{result.name})",
            result.question,
            result.status,
            f"{result.seconds:.0f}",
            "; ".join(result.reasons),
        ]
        for result in results
    ]
    heads = ["section", "question", "verdict", "seconds", "reason"]
    return markdown_table(heads, rows, left=(0, 1, 2, 4))


def _section(result: SectionResult) -> str:
    parts = [f"## {result.name}", result.question]
    parts += map(_table, _of_one_kind(result.findings))
    notes = [f"{f.what}: not measured, {f.skipped}" for f in result.findings if f.skipped]
    notes += [f"**{problem}**" for problem in result.problems]
    if result.skipped:
        notes.append(result.skipped)
    if notes:
        parts.append(bullets(notes))
    if result.details:
        parts.append(f"```text\n{result.details.strip()}\n```")
    return "\n\n".join(parts)


def _of_one_kind(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings that share most of their columns, so that few cells stay empty."""
    groups: list[list[Finding]] = []
    for finding in findings:
        for group in groups:
            shared = finding.figures.keys() & group[0].figures.keys()
            if 2 * len(shared) > len(finding.figures):
                group.append(finding)
                break
        else:
            if finding.figures:
                groups.append([finding])
    return groups


def _table(findings: Sequence[Finding]) -> str:
    columns = list(dict.fromkeys(name for finding in findings for name in finding.figures))
    rows = [
        [
            finding.what,
            *(format_figure(finding.figures.get(name, "")) for name in columns),
            "failed" if finding.problem else "",
        ]
        for finding in findings
    ]
    return markdown_table(["", *columns, ""], rows)


def format_figure(value: Figure) -> str:
    """Format a figure with three digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
