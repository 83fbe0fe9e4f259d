"""`report.html`: a comparison on one self-contained page."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit.ingest import load_series
from hf_adaclip.compare.arms import STOCK
from hf_adaclip.compare.plots import curves_chart
from hf_adaclip.compare.present import columns, heading, notes, table_rows
from hf_adaclip.report import page
from hf_adaclip.report.figures import norms_chart
from hf_adaclip.report.run_facts import left_out


def write_report(comparison: dict[str, Any], output: Path, path: Path | None = None, *, zoom: bool = False) -> Path:
    """Write the report, by default into the comparison's folder; with `zoom`, figures by plotly (4.8 MB more)."""
    parts: list[page.Part] = []
    for task in comparison["tasks"]:
        parts += [
            page.heading(heading(task)),
            page.text(str(task.get("baseline", ""))),
            page.table(columns(task), table_rows(task)),
            page.subheading(
                "Eval loss: thin lines are seeds, thick lines medians"
                + (" (drag to zoom, double-click to reset)" if zoom else "")
            ),
            page.figure(curves_chart(comparison, output, task), zoom=zoom),
        ]
        for entry in task["arms"]:
            parts += _norms(output, task["task"], entry, zoom)
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


def _norms(output: Path, task: str, entry: dict[str, Any], zoom: bool) -> list[page.Part]:
    first = entry["seeds"][0]
    if entry["arm"] == STOCK or not first["ledger"]:
        return []
    series = load_series(output / "runs" / task / entry["arm"] / "seed-0" / first["ledger"]["file"])
    thresholds, coefficients = series.decisions()
    skipped = np.flatnonzero(left_out(series))
    chart = norms_chart(series.steps, series.norms, thresholds, coefficients, skipped)
    return [
        page.subheading(f"Gradient norm, {entry['arm']}, seed 0"),
        page.text(f"Ledger {first['ledger']['summary']}"),
        page.figure(chart, zoom=zoom),
    ]
