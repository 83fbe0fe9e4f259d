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
        max_edge=1.3,
        max_near=0.2,
        ceiling_share=0.5,
        max_pace=1.0,
        pace_start=None,
        pace_trust=3.0,
        pace_hold=1 / 3,
        pace_growth=1.1,
        pace_shrink=0.95,
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
        self.ceiling_share = ceiling_share
        self.share, self.ceiling = 0.0, None
        self.max_pace = max_pace
        self.pace_start = pace_start or 50
        self.pace_trust = pace_trust
        self.pace_hold = pace_hold
        self.pace_growth = pace_growth
        self.pace_shrink = pace_shrink
        self.level, self.spread, self.width, self.count = None, min_spread, far_width, 0
        self.excursions = []
        self.pace, self.best, self.taken = 1.0 if max_pace == 1 else 1 / self.pace_start, 0.0, 0

    def step(self, norm, reach=math.nan):
        warm = self.count < self.warmup_observations
        if not warm and self.ceiling is None:
            self.share /= self.warmup_observations
            self.ceiling = self.static_threshold if self.share > self.ceiling_share else math.inf
        ceiling = math.inf if warm else self.ceiling
        level = self.level if self.level is not None else norm
        far = min(self.width * self.spread, self.max_edge)
        near = min(self.near_width * self.spread, self.max_near)
        if not math.isfinite(norm):
            threshold = (
                self.static_threshold if warm else (self.edge(level, far) if math.isfinite(level) else math.nan)
            )
            self._pace(reach, left_out=True)
            return threshold, 1.0, self.pace, "NONFINITE"
        if norm == 0:
            self._pace(reach)
            return (
                (self.static_threshold if warm else min(ceiling, self.edge(level, far))),
                1.0,
                self.pace,
                "VANISHING",
            )
        x = deviation(norm, level)
        self.count += 1
        if warm:
            gain = max(1 / self.count, 1 - self.decay)
            self.share += norm > self.static_threshold
            learned = max(-1.9, min(1.9, x))
            self.level = above(level, gain * learned)
            self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
            self._pace(reach)
            return self.static_threshold, min(1.0, self.static_threshold / (norm + 1e-6)), self.pace, "WARMUP"
        gain = max(1 / self.count, 1 - self.decay)
        learned = max(-far, min(far, x))
        high, low = x > far, x < -far
        accepted = False
        if abs(x) > min(far, 0.6):
            agrees = bool(self.excursions) and abs(deviation(norm, sum(self.excursions) / len(self.excursions))) <= far
            self.excursions = [*self.excursions, norm] if agrees else [norm]
            accepted = len(self.excursions) >= self.accept_after
        else:
            self.excursions = []
        threshold, coefficient = self.edge(level, far), 1.0
        if accepted:
            new_level = sum(self.excursions) / len(self.excursions)
            self.excursions = []
            threshold, reason = max(self.edge(new_level, far), norm), "NEW_LEVEL"
        else:
            new_level = above(level, gain * learned)
            if high:
                threshold = above(level, near)
                coefficient, reason = min(1.0, threshold / (norm + 1e-6)), "SPIKE"
                self.width = max(self.min_far_width, self.width * self.narrow_factor)
            elif low:
                reason = "VANISHING"
            elif norm > threshold:
                reason = "HELD"
            else:
                wider = min(self.max_far_width, self.width + self.widen_step)
                reason = "WIDENED" if wider > self.width and threshold <= ceiling else "WITHIN"
                self.width = wider
        self.level = new_level
        self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
        self._pace(reach, spike=high)
        if threshold > ceiling:
            threshold = ceiling
        if norm > threshold:
            coefficient = min(1.0, threshold / (norm + 1e-6))
            if reason != "SPIKE":
                reason = "HELD"
        if ceiling < math.inf:
            self.share += (1 - self.decay) * ((norm > ceiling) - self.share)
            if not self.share > self.ceiling_share / 5:
                self.ceiling = math.inf
        return threshold, coefficient, self.pace, reason

    def edge(self, level, far):
        return max(above(level, min(far, 0.6)), min(above(level, far), self.static_threshold))

    def _pace(self, reach, *, spike=False, left_out=False):
        if self.max_pace == 1:
            return
        if not left_out:
            self.taken += 1
        floor = min(1.0, max(self.taken, 1) / self.pace_start)
        useful = self.pace_hold * self.best
        if math.isfinite(reach):
            self.best = max(self.best, reach)
            useful = max(reach, self.pace_hold * self.best)
        aim = floor if useful < self.pace_trust else min(useful, self.max_pace)
        if spike or left_out:
            pace = self.pace_shrink * self.pace
        elif self.pace < aim:
            pace = min(aim, self.pace_growth * self.pace)
        else:
            pace = max(aim, self.pace_shrink * self.pace)
        self.pace = max(floor, pace)
