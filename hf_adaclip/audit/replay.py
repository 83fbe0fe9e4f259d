"""What another controller or setting would have decided on the same norms.

Counterfactual on thresholds only: had the run been clipped otherwise, its later norms would have been others. The spectral range and the
agreement keep the norm and need the gradients, so a replay leaves them aside.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hf_adaclip.audit.ingest import Series
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR, host_number
from hf_adaclip.errors import ConfigError

REPLAYABLE: Final = tuple(name for name, kind in CONTROLLERS.items() if not kind.fine)
"""Controllers that can be asked what they would have done."""

SPIKE_RATIO = 3.0
"""A norm that is so many times the median of the finite norms around it counts as a spike, whatever a controller says."""

_NEIGHBOURS = 25


@dataclass(frozen=True)
class Replay:
    """Decisions on a series of norms.

    Attributes:
        config: What decided.
        thresholds, coefficients, paces: float32, one per step.
        reasons: Codes of `Reason`, uint8.
    """

    config: AdaptiveClipConfig
    thresholds: np.ndarray
    coefficients: np.ndarray
    paces: np.ndarray
    reasons: np.ndarray


def replay(series: Series, config: AdaptiveClipConfig, *, static_threshold: float = 1.0) -> Replay:
    """Run a controller over recorded norms, from its initial state.

    Args:
        series: The norms.
        config: Controller and settings. Finer granularities are replayed on the global norm, and rules for some parameters left aside.
        static_threshold: Threshold of the warm-up, unless the config sets one.

    Raises:
        ConfigError: The controller does not go by norms.
    """
    if CONTROLLERS[config.controller].fine:
        raise ConfigError(
            f"`controller` must be a rule on norms to be replayed, but is '{config.controller}' instead: it goes by weights or optimizer "
            f"state, which no log holds. Choose from {', '.join(REPLAYABLE)}."
        )
    controller = build_controller(config)
    static = host_number(config.static_threshold if config.static_threshold is not None else static_threshold)
    state = controller.init(SCALAR, ())
    size = len(series)
    thresholds, coefficients, paces = (np.empty(size, np.float32) for _ in range(3))
    reasons = np.empty(size, np.uint8)
    with np.errstate(all="ignore"):
        reaches = np.full(size, np.nan, np.float32) if series.reaches is None else series.reaches
        for i, (norm, loss, reach) in enumerate(zip(series.norms, series.losses, reaches, strict=True)):
            decision, state = controller.update(state, Observation(norm, loss, static, reach=reach))
            thresholds[i], coefficients[i], paces[i], reasons[i] = map(float, decision)
    return Replay(config, thresholds, coefficients, paces, reasons)


def recorded_name(series: Series) -> str:
    """What the decisions of a ledger are called beside replays; another revision of the rule is named, for a replay decides otherwise."""
    header = series.header or {}
    name, revision = header.get("controller"), header.get("revision", 1)
    now = getattr(CONTROLLERS.get(str(name)), "revision", 1)
    return (
        f"recorded ({name})" if revision == now else f"recorded ({name}, revision {revision} of the rule, {now} here)"
    )


def find_spikes(norms: np.ndarray) -> np.ndarray:
    """Positions of norms far above their neighbourhood, by a rule that knows nothing of any controller.

    A finite norm is a spike when it is more than `SPIKE_RATIO` times the median of the 25 finite norms before it and also of the up to 25
    after it: a lasting rise is none.
    """
    finite = np.flatnonzero(np.isfinite(norms))
    values = norms[finite].astype(np.float64)
    if len(values) < 4:
        return np.array([], dtype=np.int64)
    padded = np.concatenate([np.full(_NEIGHBOURS, np.nan), values, np.full(_NEIGHBOURS, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _NEIGHBOURS)
    spikes = []
    # In slices: a window of 25 over a million norms is a large array to take medians of at once.
    for start in range(0, len(values), 100_000):
        stop = min(start + 100_000, len(values))
        before = _median(windows[start:stop])
        after = _median(windows[start + _NEIGHBOURS + 1 : stop + _NEIGHBOURS + 1])
        before, after = np.where(np.isnan(before), after, before), np.where(np.isnan(after), before, after)
        here = values[start:stop]
        spikes.append(start + np.flatnonzero((here > SPIKE_RATIO * before) & (here > SPIKE_RATIO * after)))
    return finite[np.concatenate(spikes)]


def _median(windows: np.ndarray) -> np.ndarray:
    """Median over the last axis, NaN left out; NaN where all are."""
    ordered = np.sort(windows, axis=1)  # NaN sort to the end
    known = (~np.isnan(ordered)).sum(axis=1)
    rows = np.arange(len(ordered))
    low = ordered[rows, np.maximum((known - 1) // 2, 0)]
    high = ordered[rows, known // 2]
    return np.where(known > 0, (low + high) / 2, np.nan)


def outcome(
    series: Series, coefficients: np.ndarray, reasons: list[str] | np.ndarray | None, spikes: np.ndarray
) -> dict[str, Any]:
    """How a set of decisions looks: shares of steps altered and left out, and what of the spikes came through."""
    finite = np.isfinite(series.norms)
    names = [Reason(r).name for r in reasons] if isinstance(reasons, np.ndarray) else (reasons or [])
    warm = np.array([n == "WARMUP" for n in names]) if len(names) else np.zeros(len(series), dtype=bool)
    altered = finite & (coefficients < 1)
    after = altered & ~warm
    applied = series.norms * coefficients
    level = float(np.median(series.norms[finite])) if finite.any() else float("nan")
    largest = float(np.max(applied[spikes])) if len(spikes) else None
    return {
        "steps": len(series),
        "altered": int(altered.sum()),
        "altered_share": float(altered.mean()),
        "altered_share_after_warmup": float(after.sum() / max(int((~warm).sum()), 1)),
        "skipped": int((~finite | (coefficients == 0)).sum()),
        "spikes": len(spikes),
        "spikes_cut": int((altered[spikes]).sum()) if len(spikes) else 0,
        "largest_applied_spike": largest,
        "largest_applied_spike_over_median": None if largest is None or not level > 0 else largest / level,
    }
