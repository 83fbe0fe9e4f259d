"""ZClip (Kumar et al. 2025), reciprocal form, learning the norm bounded by mean + z0 sd around the old mean."""

import math


class ZScoreReference:
    def __init__(self, static_threshold=1.0, z_threshold=2.5, decay=0.97, warmup_observations=25, **_):
        self.static, self.z0, self.decay, self.warmup = static_threshold, z_threshold, decay, warmup_observations
        self.buffer, self.mean, self.variance = [], 0.0, 0.0

    def step(self, norm, loss=math.nan):
        warm = len(self.buffer) < self.warmup
        sd = max(math.sqrt(self.variance), 1e-3 * self.mean)
        bound = self.mean + self.z0 * sd
        if not math.isfinite(norm):
            return (self.static if warm else bound), 1.0, 1.0, "NONFINITE"
        if norm == 0:
            return (self.static if warm else bound), 1.0, 1.0, "VANISHING"
        if warm:
            self.buffer.append(norm)
            self.mean = sum(self.buffer) / len(self.buffer)
            self.variance = sum((b - self.mean) ** 2 for b in self.buffer) / len(self.buffer)
            return self.static, min(1.0, self.static / (norm + 1e-6)), 1.0, "WARMUP"
        z = (norm - self.mean) / sd
        threshold, coefficient, reason = bound, 1.0, "WITHIN"
        if z > self.z0:
            threshold = self.mean + self.z0 * sd * self.z0 / z
            coefficient, reason = min(1.0, threshold / norm), "CLIPPED"
        learned = min(norm, bound)
        self.variance = self.decay * self.variance + (1 - self.decay) * (learned - self.mean) ** 2
        self.mean = self.decay * self.mean + (1 - self.decay) * learned
        return threshold, coefficient, 1.0, reason
