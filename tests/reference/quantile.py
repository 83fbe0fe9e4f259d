"""Geometric quantile tracking (Andrew et al. 2021, equation 1), with the true exponential."""

import math


class QuantileReference:
    def __init__(self, static_threshold=1.0, quantile=0.99, quantile_rate=0.05, warmup_observations=20, **_):
        self.static, self.gamma, self.eta, self.warmup = static_threshold, quantile, quantile_rate, warmup_observations
        self.bound, self.count = None, 0

    def step(self, norm, loss=math.nan):
        warm = self.count < self.warmup
        threshold = self.static if warm else self.bound * math.exp(self.eta * (1 - self.gamma))
        if not math.isfinite(norm):
            return threshold, 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return threshold, 1.0, 1.0, "VANISHING"
        if self.bound is None:
            self.bound = norm
        else:
            rate = max(self.eta, 1 / (self.count + 1)) if warm else self.eta
            unclipped = 0.0 if norm > self.bound else 1.0
            x = rate * (unclipped - self.gamma)
            # The rational form is for large steps (the first few) not close to the exponential, so it is taken there as it is.
            self.bound *= (2 - x) / (2 + x) if warm else math.exp(-x)
        self.count += 1
        coefficient = min(1.0, threshold / (norm + 1e-6) if warm else threshold / norm)
        reason = "WARMUP" if warm else ("CLIPPED" if coefficient < 1 else "WITHIN")
        return threshold, coefficient, 1.0, reason
