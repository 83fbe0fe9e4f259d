"""Paired comparison of arms: medians of ratios with bootstrap intervals, unreached targets kept as infinite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class PairedRatio:
    """How an arm compares with the baseline, seed by seed.

    Attributes:
        ratios: Cost of the arm over cost of the baseline, one per seed; below 1 is sooner. 0 where only the arm reached the
            target, inf where only the baseline did, 1 where neither did (neither was sooner).
        median: Median of the ratios.
        low, high: 95 % percentile bootstrap interval of the median, over seeds.
        neither: Seeds in which neither arm reached the target.
    """

    ratios: tuple[float, ...]
    median: float
    low: float
    high: float
    neither: int


def paired_ratio(arm: Sequence[float], baseline: Sequence[float], *, seed: int = 0) -> PairedRatio:
    """Compare costs to target, paired by seed.

    Args:
        arm, baseline: Costs in the same order of seeds; inf where the target was never reached.
        seed: Of the bootstrap.

    Raises:
        ValueError: Lengths differ, or there is nothing to compare.
    """
    if len(arm) != len(baseline) or not arm:
        raise ValueError(f"`arm` and `baseline` must pair up, but have {len(arm)} and {len(baseline)} values instead.")
    ratios = np.array([_ratio(a, b) for a, b in zip(arm, baseline, strict=True)])
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), size=(BOOTSTRAP_SAMPLES, len(ratios)))
    # method="nearest" never averages a finite ratio with an infinite one
    medians = np.quantile(ratios[picks], 0.5, axis=1, method="nearest" if np.isinf(ratios).any() else "linear")
    low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
    return PairedRatio(
        ratios=tuple(ratios.tolist()),
        median=median(ratios.tolist()),
        low=float(low),
        high=float(high),
        neither=sum(math.isinf(a) and math.isinf(b) for a, b in zip(arm, baseline, strict=True)),
    )


def median(values: Sequence[float]) -> float:
    """Median; of an even number of values with infinities in the middle, the larger of the two."""
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return high if math.isinf(high) else (low + high) / 2


def _ratio(arm: float, baseline: float) -> float:
    if math.isinf(arm) and math.isinf(baseline):
        return 1.0
    if math.isinf(baseline):
        return 0.0
    return arm / baseline
