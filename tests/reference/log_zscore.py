"""lingvo's GradNormTracker on log n, in float64 with the library's own logarithm."""

import math


class LogZScoreReference:
    def __init__(self, static_threshold=1.0, log_width=4.0, log_decay=0.995, warmup_observations=20, **_):
        self.static, self.width, self.decay, self.warmup = static_threshold, log_width, log_decay, warmup_observations
        self.learned, self.mean, self.second, self.weight = 0, 0.0, 0.0, 0.0
        self.first = None

    def step(self, norm, loss=math.nan):
        warm = self.learned < self.warmup
        cap = math.inf
        if self.weight > 0:
            mean = self.mean / self.weight
            sd = max(math.sqrt(max(self.second / self.weight - mean * mean, 0.0)), 1e-3)
            cap = mean + self.width * sd
        threshold = self.static if warm else math.exp(self.first + cap)
        if not math.isfinite(norm):
            return threshold, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return threshold, 1.0, 1.0, "VANISHING"
        if self.first is None:
            self.first = math.log(norm)
        x = math.log(norm) - self.first
        y = x if warm else min(x, cap)
        self.mean = self.decay * self.mean + (1 - self.decay) * y
        self.second = self.decay * self.second + (1 - self.decay) * y * y
        self.weight = self.decay * self.weight + (1 - self.decay)
        self.learned += 1
        coefficient = min(1.0, threshold / (norm + 1e-6) if warm else threshold / norm)
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return threshold, coefficient, 1.0, reason
