"""Would adaptive clipping have done anything in a run that somebody already has? `hf-adaclip advise`."""

import math
from typing import Any

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.audit.replay import REPLAYABLE, find_spikes, outcome, replay
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason

ALWAYS_ON = 0.5
"""A threshold that alters more than this share of steps does not guard against spikes, it sets the size of every step; `ceiling_share` of
the controller `adaptive` is the same share, of its warm-up."""

FEWEST = 20
"""Calm norms below which no other threshold is recommended: of fewer the largest is all that is known."""


def advise(series: Series, *, max_grad_norm: float | None = None) -> dict[str, Any]:
    """Look at a run's norms and say what was there and what each controller would have done with it.

    Args:
        series: Norms of the run.
        max_grad_norm: The static threshold of the run; by default what its ledger says, or 1.0.

    Returns:
        JSON-ready findings; `verdict` and `uncertainty` are sentences, `recommended` are fields of `AdaptiveClipConfig`.
    """
    if max_grad_norm is None:
        recorded = (series.header or {}).get("static_threshold")
        max_grad_norm = float(recorded) if isinstance(recorded, int | float) and 0 < recorded < math.inf else 1.0
    finite = series.norms[np.isfinite(series.norms)]
    spikes = find_spikes(series.norms)
    static_share = float((finite > max_grad_norm).mean()) if len(finite) else 0.0
    arms = {}
    kept = False
    for name in REPLAYABLE:
        decided = replay(series, AdaptiveClipConfig(controller=name), static_threshold=max_grad_norm)
        arms[name] = outcome(series, decided.coefficients, decided.reasons, spikes)
        kept = kept or bool((decided.reasons == Reason.HELD).any())  # only `adaptive` ever says so
    calm = np.delete(series.norms, spikes)
    calm = calm[np.isfinite(calm)]
    always_on = static_share > ALWAYS_ON
    told = len(calm) >= FEWEST and not always_on
    threshold = _round_up(float(np.quantile(calm, 0.99))) if told else max_grad_norm
    largest = sorted(spikes.tolist(), key=lambda i: -float(series.norms[i]))[:10]
    median = float(np.median(calm)) if len(calm) else math.nan
    return {
        "path": series.path,
        "source": series.source,
        "steps_known": len(series),
        "every": series.every,
        "left_out": list(series.left_out),
        "gaps": [list(gap) for gap in series.gaps],
        "not_finite": int((~np.isfinite(series.norms)).sum()),
        "median_norm": median,
        "spikes": len(spikes),
        "largest_spikes": [
            {
                "step": int(series.steps[i]),
                "norm": float(series.norms[i]),
                "times_median": float(series.norms[i]) / median,
            }
            for i in largest
        ],
        "max_grad_norm": max_grad_norm,
        "static_altered_share": static_share,
        "static_always_on": always_on,
        "controllers": arms,
        "recommended": {"controller": "adaptive", "static_threshold": threshold},
        "reasons": {r.name: n for r in Reason if (n := (series.reasons or []).count(r.name))},
        "verdict": _verdict(series, len(spikes), static_share, always_on, kept, arms, max_grad_norm),
        "uncertainty": _uncertainty(series, len(spikes)),
    }


def _verdict(
    series: Series,
    spikes: int,
    static_share: float,
    always_on: bool,
    kept: bool,
    arms: dict[str, dict[str, Any]],
    max_grad_norm: float,
) -> str:
    def done(name: str) -> str:
        others = arms[name]["altered"] - arms[name]["spikes_cut"]
        return f"cut {arms[name]['spikes_cut']} of them and altered {others / max(len(series) - spikes, 1):.1%} of the other steps"

    parts = []
    bad = int((~np.isfinite(series.norms)).sum())
    if bad:
        parts.append(f"{bad} step(s) had a NaN or infinite norm; every one would have been left out without a trace.")
    if spikes and always_on:
        parts.append(f"{spikes} spike(s) were found.")
    elif spikes:
        parts.append(
            f"{spikes} spike(s) were found; adaptive clipping would have {done('adaptive')}, its warm-up included."
        )
    elif not bad and not always_on:
        parts.append(
            "No spike and no bad step was found: adaptive clipping would have had next to nothing to do here."
        )
    if always_on:
        parts.append(
            f"A static {max_grad_norm:g} altered {static_share:.0%} of the steps: it is always on, and sets the length of every "
            "gradient rather than guarding against spikes. "
            + (
                "Adaptive clipping keeps it as its ceiling as long as that is so, and changes the run only where norms are below it. To "
                "open the range instead, set ceiling_share=1 and tune the learning rate again."
                if kept
                else "Adaptive clipping does not keep it, because it cut less than half of the warm-up: that changes the run. "
                "`max_threshold` keeps it."
            )
        )
    elif static_share == 0:
        parts.append(f"A static {max_grad_norm:g} never acted.")
    elif spikes:
        parts.append(f"A static {max_grad_norm:g} would have {done('static')}.")
    else:
        parts.append(f"A static {max_grad_norm:g} altered {static_share:.1%} of the steps.")
    return " ".join(parts)


def _uncertainty(series: Series, spikes: int) -> str:
    return " ".join([_known(series, spikes), *series.left_out])


def _known(series: Series, spikes: int) -> str:
    first, last = int(series.steps[0]), int(series.steps[-1])
    if len(series) == 1:
        return f"Only one norm is known, that of step {first}: it says nothing of the others."
    if len(series) < FEWEST:
        return f"Only {len(series)} norms are known, too few to recommend another threshold."
    gaps = series.gaps
    missing = sum((after - before) // series.every - 1 for before, after in gaps)
    where = ", ".join(f"{before} to {after}" for before, after in gaps[:3]) + (", ..." if len(gaps) > 3 else "")
    gap = f"{missing} norm(s) are not in the log (between steps {where})." if gaps else ""
    if series.every == 1:
        if gaps:
            return f"{gap} Between them every step is known."
        return "Every step is known." if first <= 1 else f"Every step from {first} to {last} is known."
    low, high = wilson(spikes, len(series))
    text = (
        f"Only one in {series.every} steps was logged, so most spikes, which last one step, are unseen: {spikes} in {len(series)} known "
        f"steps means between {low * 1000:.1f} and {high * 1000:.1f} per 1000 steps (95 %). Controllers were replayed on the logged norms "
        "alone, so their memory spans more steps than in a real run. Log every step, or run once with shadow=True, to know."
    )
    return f"{text} {gap}".strip()


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927): sensible for no hits at all."""
    if total == 0:
        return 0.0, 1.0
    p = hits / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _round_up(value: float) -> float:
    """Two significant digits, upward."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 12)
