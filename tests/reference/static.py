"""Pascanu et al. 2013, algorithm 1."""

import math


class StaticReference:
    def __init__(self, static_threshold=1.0, **_):
        self.threshold = static_threshold

    def step(self, norm, loss=math.nan):
        """Returns threshold, coefficient, pace, reason."""
        if not math.isfinite(norm):
            return self.threshold, 1.0, 1.0, "NONFINITE"
        coefficient = min(1.0, self.threshold / (norm + 1e-6))
        return self.threshold, coefficient, 1.0, "CLIPPED" if coefficient < 1 else "WITHIN"
