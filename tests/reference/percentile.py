"""AutoClip (Seetharaman et al. 2020) with a bounded history that is judged before it learns; numpy.percentile is the oracle."""

import math

import numpy as np


class PercentileReference:
    def __init__(
        self, static_threshold=1.0, percentile=10.0, history=1000, warmup_observations=20, percentile_capped=False, **_
    ):
        self.static, self.p, self.window, self.warmup = static_threshold, percentile, history, warmup_observations
        self.seen, self.capped = [], percentile_capped

    def step(self, norm, loss=math.nan):
        warm = len(self.seen) < self.warmup
        threshold = self.static if warm else float(np.percentile(self.seen[-self.window :], self.p))
        if self.capped:
            threshold = min(threshold, self.static)
        if not math.isfinite(norm):
            return threshold, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return threshold, 1.0, 1.0, "VANISHING"
        coefficient = min(1.0, threshold / (norm + 1e-6) if warm else threshold / norm)
        self.seen.append(norm)
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return threshold, coefficient, 1.0, reason
