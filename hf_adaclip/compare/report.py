"""`report.html`: a comparison on one self-contained page."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import load_series
from hf_adaclip.compare.arms import STOCK
from hf_adaclip.compare.plots import curves_chart
from hf_adaclip.compare.present import columns, heading, notes, table_rows
from hf_adaclip.compare.verdict import verdicts
from hf_adaclip.report import page
from hf_adaclip.report.figures import line_chart, norms_chart, shape_chart
from hf_adaclip.report.run_facts import left_out
from hf_adaclip.report.shape_facts import remarks, shape_numbers

_SMALL: Final = 180
"""Height of the figures beside that of the norms."""


def write_report(comparison: dict[str, Any], output: Path, path: Path | None = None, *, zoom: bool = False) -> Path:
    """Write the report, by default into the comparison's folder; with `zoom`, figures by plotly (4.8 MB more)."""
    parts = [page.text(sentence, "lead") for sentence in verdicts(comparison)]
    for task in comparison["tasks"]:
        parts += [
            page.heading(heading(task)),
            page.text(str(task.get("baseline", ""))),
            page.table(columns(task), _unbroken(table_rows(task)), short=["arm"]),
            page.subheading(
                "Eval loss: thin lines are seeds, thick lines medians"
                + (" (drag to zoom, double-click to reset)" if zoom else "")
            ),
            page.figure(curves_chart(comparison, output, task), zoom=zoom),
        ]
        for entry in task["arms"]:
            parts += _one_run(output, task["task"], entry, zoom)
    parts += [
        page.heading("How to read this"),
        page.bullets(notes(comparison)),
        page.text(f"Made by: {comparison['command']}", ""),
    ]
    versions = " · ".join(f"{k} {v}" for k, v in comparison["versions"].items())
    subtitle = f"{comparison['created']} · {comparison['device']} · {versions}"
    return page.write_page(
        path or output / "report.html", "Time to target: adaptive clipping against the stock Trainer", subtitle, parts
    )


def _unbroken(rows: list[list[str]]) -> list[list[str]]:
    """A number and its unit stay on one line."""
    return [[cell.replace(" Wh", "\u00a0Wh").replace(" s", "\u00a0s") for cell in row] for row in rows]


def _one_run(output: Path, task: str, entry: dict[str, Any], zoom: bool) -> list[page.Part]:
    """What an arm of ours did in its first run: norm and threshold, and small beside it the pace and what shapes the step."""
    first = entry["seeds"][0]
    if entry["arm"] == STOCK or not first["ledger"]:
        return []
    series = load_series(output / "runs" / task / entry["arm"] / "seed-0" / first["ledger"]["file"])
    thresholds, coefficients = series.decisions()
    skipped = np.flatnonzero(left_out(series))
    charts = [norms_chart(series.steps, series.norms, thresholds, coefficients, skipped)]
    paces = np.ones(1, np.float32) if series.paces is None else series.paces
    if (paces != 1).any():
        charts.append(line_chart(series.steps, paces, "pace", "pace", height=_SMALL, points=400))
    shapes = shape_chart(series.steps, series.altered_energies, series.agreeing_shares, height=_SMALL)
    charts += [] if shapes is None else [shapes]
    shadow = ((series.header or {}).get("config") or {}).get("shadow") is True
    numbers = {**shape_numbers(series), "shadow": shadow, "largest_pace": float(paces.max())}
    return [
        page.subheading(f"What {entry['arm']} did, seed 0"),
        page.text(f"Ledger {first['ledger']['summary']}"),
        *(page.figure(chart, zoom=zoom) for chart in charts),
        *(page.text(text) for text in remarks(numbers)),
    ]
