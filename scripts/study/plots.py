"""Pictures of the study: eval loss over steps, and final loss over the learning rate."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.report.chart import ARM_COLOURS, COLOURS
from scripts.study.results import STEP, TaskResults, losses

CURVES = ("stock", "tuned", "adaptive", "adaptive-tuned")
RANGES = ("stock", "adaptive")


def draw_curves(results: Sequence[TaskResults], path: Path, arms: Sequence[str] = CURVES) -> None:
    """A panel per task; thin lines are seeds, thick ones medians, dashed ones the targets."""
    figure, axes = _panels(len(results))
    for axis, r in zip(axes, results, strict=False):
        for arm, colour in zip(arms, map(COLOURS.get, ARM_COLOURS), strict=False):
            curves = [
                ([p[STEP] for p in r.runs[arm, s]["points"]], losses(r.runs[arm, s]))
                for s in (r.seeds(arm) if arm in r.arms else [])
            ]
            for steps, values in curves:
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            whole = [c for c in curves if len(c[0]) == max(len(d[0]) for d in curves)]
            if whole:
                # Where another arm does what the stock Trainer does, its line lies on this broad one.
                looks = {"linewidth": 6, "alpha": 0.4} if arm == "stock" else {"linewidth": 2}
                axis.plot(whole[0][0], np.median([v for _, v in whole], axis=0), color=colour, label=arm, **looks)
        for baseline, style in (("stock", "--"), ("tuned", ":")):
            target = r.target(baseline)
            if target is not None:
                axis.axhline(target, color="#555555", linestyle=style, linewidth=1)
        _finish(axis, r, "optimizer steps", "eval loss")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def draw_ranges(results: Sequence[TaskResults], path: Path, arms: Sequence[str] = RANGES) -> None:
    """A panel per task: final loss over the learning rate, an arm a line."""
    shown = [r for r in results if r.range_of("stock") is not None]
    figure, axes = _panels(len(shown))
    for axis, r in zip(axes, shown, strict=False):
        for arm, colour in zip(arms, (COLOURS[ARM_COLOURS[0]], COLOURS[ARM_COLOURS[3]]), strict=True):
            found = r.range_of(arm)
            if found is not None:
                finals = list(found.finals.values())
                axis.plot(list(found.finals), finals, "o-", color=colour, label=arm, markersize=3)
        axis.set_xscale("log", base=2)
        axis.axvline(r.task.rate, color="#555555", linestyle="--", linewidth=1)
        _finish(axis, r, "learning rate (dashed: as it comes)", "final eval loss")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.2g}")
    if shown:
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    columns = min(4, max(1, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _finish(axis: Any, r: TaskResults, x: str, y: str) -> None:
    axis.set_title(f"{r.task.name} ({r.task.group})", loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_yscale("log")
    for kind in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        kind("{x:g}")
    axis.grid(True, which="both", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
