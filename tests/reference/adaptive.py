"""The `adaptive` controller from the formulas of its description: lists and branches, one norm at a time, float64."""

import math


def deviation(norm, level):
    return 2 * (norm - level) / (norm + level)


def above(level, e):
    return level * (2 + e) / (2 - e)


class AdaptiveReference:
    def __init__(
        self,
        static_threshold=1.0,
        decay=0.97,
        warmup_observations=20,
        far_width=5.0,
        near_width=1.5,
        min_far_width=4.5,
        max_far_width=8.0,
        widen_step=0.01,
        narrow_factor=0.8,
        accept_after=6,
        min_spread=0.05,
        max_edge=0.6,
        max_near=0.2,
        max_pace=1.0,
        pace_growth=1.02,
        pace_backoff=0.7,
        pace_progress_fast=0.9,
        pace_progress_slow=0.98,
        **_,
    ):
        self.static_threshold = static_threshold
        self.decay = decay
        self.warmup_observations = warmup_observations
        self.far_width = far_width
        self.near_width = near_width
        self.min_far_width = min_far_width
        self.max_far_width = max_far_width
        self.widen_step = widen_step
        self.narrow_factor = narrow_factor
        self.accept_after = accept_after
        self.min_spread = min_spread
        self.max_edge = max_edge
        self.max_near = max_near
        self.max_pace = max_pace
        self.pace_growth = pace_growth
        self.pace_backoff = pace_backoff
        self.pace_progress_fast = pace_progress_fast
        self.pace_progress_slow = pace_progress_slow
        self.level, self.spread, self.width, self.count = None, min_spread, far_width, 0
        self.excursions = []
        self.pace, self.fast, self.slow = 1.0, math.nan, math.nan

    def step(self, norm, loss=math.nan):
        warm = self.count < self.warmup_observations
        level = self.level if self.level is not None else norm
        far = min(self.width * self.spread, self.max_edge)
        near = min(self.near_width * self.spread, self.max_near)
        if not math.isfinite(norm):
            threshold = self.static_threshold if warm else (above(level, far) if math.isfinite(level) else math.nan)
            self._pace(loss, calm=False, trouble=True)
            return threshold, 1.0, self.pace, "NONFINITE"
        if norm == 0:
            self._pace(loss, calm=False, trouble=False)
            return (self.static_threshold if warm else above(level, far)), 1.0, self.pace, "VANISHING"
        x = deviation(norm, level)
        self.count += 1
        if warm:
            gain = max(1 / self.count, 1 - self.decay)
            learned = max(-1.9, min(1.9, x))
            self.level = above(level, gain * learned)
            self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
            self._pace(loss, calm=False, trouble=False)
            return self.static_threshold, min(1.0, self.static_threshold / (norm + 1e-6)), self.pace, "WARMUP"
        gain = max(1 / self.count, 1 - self.decay)
        learned = max(-far, min(far, x))
        high, low = x > far, x < -far
        accepted = False
        if high or low:
            agrees = bool(self.excursions) and abs(deviation(norm, sum(self.excursions) / len(self.excursions))) <= far
            self.excursions = [*self.excursions, norm] if agrees else [norm]
            accepted = len(self.excursions) >= self.accept_after
        else:
            self.excursions = []
        threshold, coefficient = above(level, far), 1.0
        if accepted:
            new_level = sum(self.excursions) / len(self.excursions)
            self.excursions = []
            threshold, reason = max(above(new_level, far), norm), "NEW_LEVEL"
        else:
            new_level = above(level, gain * learned)
            if high:
                threshold = above(level, near)
                coefficient, reason = min(1.0, threshold / (norm + 1e-6)), "SPIKE"
                self.width = max(self.min_far_width, self.width * self.narrow_factor)
            elif low:
                reason = "VANISHING"
            else:
                wider = min(self.max_far_width, self.width + self.widen_step)
                reason = "WIDENED" if wider > self.width else "WITHIN"
                self.width = wider
        self.level = new_level
        self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
        self._pace(loss, calm=not (high or low), trouble=high)
        return threshold, coefficient, self.pace, reason

    def _pace(self, loss, *, calm, trouble):
        if self.max_pace == 1:
            return
        known = math.isfinite(loss)
        if known and math.isnan(self.slow):
            self.fast = self.slow = loss
        elif known:
            self.fast = self.pace_progress_fast * self.fast + (1 - self.pace_progress_fast) * loss
            self.slow = self.pace_progress_slow * self.slow + (1 - self.pace_progress_slow) * loss
        if trouble:
            self.pace = max(1.0, self.pace * self.pace_backoff)
        elif calm and known and self.fast < self.slow:
            self.pace = min(self.max_pace, self.pace * self.pace_growth)
