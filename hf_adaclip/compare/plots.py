"""Curves of a comparison: `curves.png` by matplotlib, and the same as a chart for the report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.compare.present import title_of
from hf_adaclip.compare.runs import RESULT_FILE
from hf_adaclip.report.chart import ARM_COLOURS, COLOURS, Chart, Line


def load_curves(output: Path, task: str, arm: str, seeds: int) -> list[tuple[list[float], list[float], list[float]]]:
    """Per seed: steps, training seconds, eval losses. Failed runs have none."""
    curves = []
    for seed in range(seeds):
        path = output / "runs" / task / arm / f"seed-{seed}" / RESULT_FILE
        points = json.loads(path.read_text(encoding="utf-8")).get("points", [])
        curves.append(
            (
                [p["step"] for p in points],
                [math.nan if p["train_seconds"] is None else p["train_seconds"] for p in points],
                [float(p["metrics"].get("eval_loss", math.nan)) for p in points],
            )
        )
    return curves


def median_curve(
    curves: list[tuple[list[float], list[float], list[float]]], axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Median over seeds, evaluation by evaluation, of the x axis chosen and of the loss."""
    full = [c for c in curves if len(c[2]) == max(len(d[2]) for d in curves) and c[2]]
    if not full:
        return np.array([]), np.array([])
    return np.median([c[axis] for c in full], axis=0), np.median([c[2] for c in full], axis=0)


def draw_png(comparison: dict[str, Any], output: Path, path: Path | None = None) -> Path:
    """One row per task, eval loss over steps and over seconds; thin lines are seeds, thick ones medians."""
    from matplotlib.figure import Figure

    tasks = comparison["tasks"]
    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, (column, label) in zip(row, ((0, "optimizer steps"), (1, "training seconds")), strict=True):
            lowest, start = math.inf, 0.0
            for entry, name in zip(task["arms"], ARM_COLOURS, strict=False):
                colour = COLOURS[name]
                curves = load_curves(output, task["task"], entry["arm"], comparison["seeds"])
                for curve in curves:
                    axis.plot(curve[column], curve[2], color=colour, alpha=0.25, linewidth=0.8)
                x, y = median_curve(curves, column)
                axis.plot(x, y, color=colour, linewidth=2, label=_plain(entry["arm"]))
                if len(y):
                    lowest, start = min(lowest, float(np.nanmin(y))), max(start, float(y[0]))
            axis.axhline(task["target"]["value"], color="#555555", linestyle="--", linewidth=1, label="target")
            axis.set_xlabel(label)
            axis.set_ylabel("eval loss")
            axis.set_yscale("log")
            for kind in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                kind("{x:g}")
            if math.isfinite(lowest) and start > lowest:
                axis.set_ylim(lowest * 0.9, start * 1.1)
            axis.grid(True, which="both", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(_plain(title_of(task)), loc="left", fontsize=10)
        row[1].legend(frameon=False, fontsize=9)
    path = path or output / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def curves_chart(comparison: dict[str, Any], output: Path, task: dict[str, Any]) -> Chart:
    """Eval loss over steps; thin lines are seeds, thick ones medians."""
    lines = []
    last = 1.0
    for entry, colour in zip(task["arms"], ARM_COLOURS, strict=False):
        curves = load_curves(output, task["task"], entry["arm"], comparison["seeds"])
        arm = entry["arm"]
        for seed, curve in enumerate(curves):
            lines.append(Line(curve[0], curve[2], f"{arm} seed {seed}", colour, 1, opacity=0.35, named=False))
        x, y = median_curve(curves, 0)
        lines.append(Line(x.tolist(), y.tolist(), arm, colour, 3))
        last = max([last, *(x for curve in curves for x in curve[0])])
    lines.append(Line([0, last], [task["target"]["value"]] * 2, "target", "grey", 1, dashed=True))
    return Chart("optimizer steps", "eval loss", lines, log=True)


def _plain(label: object) -> str:
    """A label that matplotlib shows as it is: no maths, and not left out for beginning with an underscore."""
    text = str(label).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
