"""Mean plus standard deviations of a window (OLMo-core), learning what is below the bound; statistics.stdev is the oracle."""

import math
import statistics


class MeanSdReference:
    def __init__(self, static_threshold=1.0, sd_width=6.0, sd_window=128, warmup_observations=20, **_):
        self.static, self.width, self.window, self.warmup = static_threshold, sd_width, sd_window, warmup_observations
        self.seen = []

    def step(self, norm, loss=math.nan):
        warm = len(self.seen) < self.warmup
        last = self.seen[-self.window :]
        bound = self.static
        if not warm:
            mean = statistics.fmean(last)
            bound = mean + self.width * max(statistics.stdev(last), 1e-3 * mean)
        if not math.isfinite(norm):
            return bound, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return bound, 1.0, 1.0, "VANISHING"
        coefficient = min(1.0, bound / (norm + 1e-6) if warm else bound / norm)
        self.seen.append(norm if warm else min(norm, bound))
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return bound, coefficient, 1.0, reason
