"""Findings of replay, advise and diff as text and pictures for people."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.audit.replay import Replay
from hf_adaclip.controllers import Reason

COUNTERFACTUAL = (
    "Counterfactual on thresholds only: had the run been clipped otherwise, the norms after it would have been others."
)
_MAX_POINTS = 4000


def outcome_table(rows: dict[str, dict[str, Any]]) -> str:
    """A table of outcomes, one row per controller or run."""
    head = f"{'':24s} {'altered':>9s} {'after warm-up':>14s} {'left out':>9s} {'spikes cut':>11s} {'largest applied spike':>22s}"
    lines = [head]
    for name, o in rows.items():
        times = o["largest_applied_spike_over_median"]
        largest = "-" if times is None else f"{times:.2f} x median"
        lines.append(
            f"{name:24s} {o['altered_share']:9.2%} {o['altered_share_after_warmup']:14.2%} {o['skipped']:9d} "
            f"{o['spikes_cut']:5d}/{o['spikes']:<5d} {largest:>22s}"
        )
    return "\n".join(lines)


def advice_text(advice: dict[str, Any]) -> str:
    """What `advise` found, in a screen of text."""
    lines = [
        f"{advice['path']} ({advice['source']}): {advice['steps_known']} norms, "
        + ("" if advice["every"] == 1 else f"one in {advice['every']} steps, ")
        + f"median {advice['median_norm']:.4g}",
        "",
        advice["verdict"],
        advice["uncertainty"],
        "",
        outcome_table(advice["controllers"]),
        "",
        COUNTERFACTUAL,
    ]
    if advice["largest_spikes"]:
        spikes = ", ".join(f"step {s['step']} ({s['times_median']:.1f} x)" for s in advice["largest_spikes"])
        lines += ["", f"Largest spikes: {spikes}"]
    if advice.get("reasons"):
        lines += ["", "Reasons that the ledger gives:"]
        lines += [f"  {name:18s} {count:7d}  {Reason[name].sentence}" for name, count in advice["reasons"].items()]
    threshold = advice["recommended"]["static_threshold"]
    fields = ", ".join(f"{k}={v!r}" for k, v in advice["recommended"].items())
    lines += [
        "",
        f"Recommended: AdaptiveClipConfig({fields})",
        "  static_threshold: "
        + ("as it was" if threshold == advice["max_grad_norm"] else "what 99 % of the calm norms stay below"),
    ]
    return "\n".join(lines)


def keep_extremes(x: np.ndarray, y: np.ndarray, limit: int = _MAX_POINTS) -> np.ndarray:
    """Positions of at most about `limit` points that draw the same picture: of every bucket its lowest and its highest value.

    A plain every-n-th point would drop spikes; this one keeps each of them. NaN and inf are never chosen over a number.
    """
    if len(x) <= limit:
        return np.arange(len(x))
    edges = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    low, high = np.where(np.isfinite(y), y, np.inf), np.where(np.isfinite(y), y, -np.inf)
    chosen = [
        start + offset
        for start, stop in pairwise(edges)
        for offset in sorted({int(np.argmin(low[start:stop])), int(np.argmax(high[start:stop]))})
    ]
    return np.array(chosen)


def draw_replay(series: Series, replays: list[Replay], path: Path, titles: list[str] | None = None) -> Path:
    """Norms and thresholds on a log axis, what each replay would have cut marked. Needs matplotlib.

    Args:
        series: The norms.
        replays: What was decided on them.
        path: PNG to write.
        titles: Of the panels; by default the controllers' names.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(replays)), layout="constrained")
    axes = figure.subplots(len(replays), 1, squeeze=False, sharex=True)[:, 0]
    points = keep_extremes(series.steps, series.norms)
    titles = titles or [decided.config.controller for decided in replays]
    for axis, decided, title in zip(axes, replays, titles, strict=True):
        axis.plot(series.steps[points], series.norms[points], color="#0072B2", linewidth=0.8, label="norm")
        axis.plot(series.steps[points], decided.thresholds[points], color="#E69F00", linewidth=1, label="threshold")
        cut = np.flatnonzero(decided.coefficients < 1)
        cut = cut[keep_extremes(series.steps[cut], series.norms[cut])] if len(cut) else cut
        axis.plot(series.steps[cut], series.norms[cut], "v", color="#D55E00", markersize=4, label="would be cut")
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper right")
    axes[-1].set_xlabel("optimizer steps")
    figure.suptitle(COUNTERFACTUAL, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    return path
