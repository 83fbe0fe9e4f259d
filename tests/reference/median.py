"""Running median (icefall's clipping_scale); statistics.median is the oracle."""

import math
import statistics


class MedianReference:
    def __init__(self, static_threshold=1.0, median_factor=2.0, median_window=100, warmup_observations=20, **_):
        self.static, self.factor, self.window, self.warmup = (
            static_threshold,
            median_factor,
            median_window,
            warmup_observations,
        )
        self.seen = []

    def step(self, norm, loss=math.nan):
        warm = len(self.seen) < self.warmup
        threshold = self.static if warm else self.factor * statistics.median(self.seen[-self.window :])
        if not math.isfinite(norm):
            return threshold, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return threshold, 1.0, 1.0, "VANISHING"
        self.seen.append(norm)
        coefficient = min(1.0, threshold / (norm + 1e-6) if warm else threshold / norm)
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return threshold, coefficient, 1.0, reason
