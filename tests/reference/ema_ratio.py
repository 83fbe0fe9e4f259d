"""AdaGC (Wang et al. 2025), algorithm 1, for one tensor."""

import math


class EmaRatioReference:
    def __init__(self, static_threshold=1.0, ema_factor=1.05, ema_decay=0.98, warmup_observations=20, **_):
        self.static, self.factor, self.decay, self.warmup = (
            static_threshold,
            ema_factor,
            ema_decay,
            warmup_observations,
        )
        self.gamma, self.count = math.inf, 0

    def step(self, norm, loss=math.nan):
        warm = self.count < self.warmup
        threshold = self.static if warm else self.factor * self.gamma
        if not math.isfinite(norm):
            return threshold, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return threshold, 1.0, 1.0, "VANISHING"
        self.count += 1
        passed = min(norm, threshold)
        self.gamma = min(self.gamma, passed) if warm else self.decay * self.gamma + (1 - self.decay) * passed
        coefficient = min(1.0, threshold / (norm + 1e-6) if warm else threshold / norm)
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return threshold, coefficient, 1.0, reason
