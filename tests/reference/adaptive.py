"""The `adaptive` controller from the formulas of its description: lists and branches, one norm at a time, float64."""

import math

from tests.reference.trend import TrendReference


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
        max_pace=None,
        pace_start=None,
        pace_trust=3.0,
        pace_hold=1 / 3,
        pace_growth=1.25,
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
        self.max_pace = max_pace or 1.0
        self.pace_start = pace_start or 50
        self.pace_trust = pace_trust
        self.pace_hold = pace_hold
        self.pace_growth = pace_growth
        self.pace_shrink = pace_shrink
        self.level, self.spread, self.width, self.count = None, min_spread, far_width, 0
        self.excursions = []
        self.given, self.quiet, self.trend = None, None, TrendReference(2.0, 0.0)
        self.first_loss, self.little, self.done = 0.0, False, False
        self.crest, self.memory, self.was_upward = 0.0, 0.0, False
        self.rivals = [[0.0, 0.0], [0.0, 0.0]]  # level, hits
        self.pace, self.best, self.taken = 1.0 if self.max_pace == 1 else 1 / self.pace_start, 0.0, 0

    def step(self, norm, reach=math.nan, loss=math.nan):
        self.little = self.trend.known() and self.first_loss > 0 and self.trend.mean <= self.first_loss / 20
        warm = self.count < self.warmup_observations
        if not warm and self.ceiling is None:
            self.share /= self.warmup_observations
            self.ceiling = self.static_threshold if self.share > self.ceiling_share else math.inf
        ceiling = math.inf if warm else self.ceiling
        level = self.level if self.level is not None else norm
        far = min(self.width * self.spread, self.max_edge)
        near = min(self.near_width * self.spread, self.max_near)
        bound = self.bound(level, loss)
        edge = explained = self.edge(level, far) if math.isfinite(level) else math.nan
        if self.memory >= 4:
            explained = max(edge, above(self.crest, max(far, 0.6)))
        top = min(explained, bound)
        if not math.isfinite(norm) or norm == 0:
            self._pace(reach, left_out=norm != 0)
            reason = "VANISHING" if norm == 0 else "NONFINITE"
            return (self.static_threshold if warm else min(ceiling, top)), 1.0, self.pace, reason
        x = deviation(norm, level)
        self.count += 1
        gain = max(1 / self.count, 1 - self.decay)
        if warm:
            self.share += norm > self.static_threshold
            learned = max(-1.9, min(1.9, x))
            self.level = above(level, gain * learned)
            self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
            self._learn_loss(loss)
            self._pace(reach)
            return self.static_threshold, min(1.0, self.static_threshold / (norm + 1e-6)), self.pace, "WARMUP"

        given = level if self.given is None else self.given
        over, low = norm > top, x < -far
        mean, accepted = norm, False
        if abs(x) > min(far, 0.6):
            agrees = bool(self.excursions) and abs(deviation(norm, sum(self.excursions) / len(self.excursions))) <= far
            self.excursions = [*self.excursions, norm] if agrees else [norm]
            mean = sum(self.excursions) / len(self.excursions)
            accepted = len(self.excursions) >= self.accept_after
        else:
            self.excursions = []
        usual = not self.excursions
        high = norm > explained and x > far
        spike = high and not accepted
        recurring = edge < norm <= explained and not accepted
        learned = max(-far, min(far, x))

        if spike:
            threshold = min(above(level, near), bound)
        elif accepted:
            threshold = min(max(self.edge(mean, far), norm, top), bound)
        else:
            threshold = top
        kept = threshold > ceiling
        threshold = min(threshold, ceiling)
        passes = norm <= threshold
        if spike:
            reason = "SPIKE"
            self.width = max(self.min_far_width, self.width * self.narrow_factor)
        elif not passes:
            reason = "HELD" if threshold == self.static_threshold else "BOUNDED"
        elif accepted:
            reason = "NEW_LEVEL"
        elif low:
            reason = "VANISHING"
        else:
            wider = self.quiet is not None and threshold > self.quiet and usual and not kept
            reason = "WIDENED" if wider else "WITHIN"
        if not (spike or over or low or accepted or recurring):
            self.width = min(self.max_far_width, self.width + self.widen_step)
        if passes:
            self.quiet = threshold
            coefficient = 1.0
        else:
            coefficient = threshold / norm
        if accepted and mean <= bound:
            self.excursions = []

        upward = bool(x > min(far, 0.6))
        counts = upward and (accepted or not self.was_upward) and not self.speaks_against()
        self._remember(norm, far, weight=(2.0 if accepted else 1.0) if counts else 0.0, new=over and not recurring)
        self.was_upward = upward
        if accepted:
            self.level = mean
        elif not recurring:
            self.level = above(level, gain * learned)
        self.level = min(self.level, bound)
        if not recurring:
            self.spread = max(self.min_spread, self.spread + gain * (abs(learned) - self.spread))
        best, known = self.trend.best, self.trend.known()
        self.trend.learn(loss)
        if ceiling < math.inf:
            given = min(self.level, self.static_threshold)
        elif known and self.trend.best < best:
            given = max(given, min(1.5 * self.level, 1.03 * given))
        self.given = given
        self._pace(reach, spike=high)
        if ceiling < math.inf:
            self.share += (1 - self.decay) * ((norm > self.static_threshold) - self.share)
            if not self.share > self.ceiling_share / 5:
                self.ceiling = math.inf
        return threshold, coefficient, self.pace, reason

    def speaks_against(self):
        return self.trend.known() and self.trend.far()

    def bound(self, level, loss):
        if self.ceiling is not None and self.ceiling < math.inf:
            return math.inf
        given = level if self.given is None else self.given
        fine = not self.trend.known() or (not self.trend.far() and loss <= self.trend.best + 4 * self.trend.s())
        fine_factor, worse_factor = (1.25, 1.0) if self.ceiling_share < 1 else (8.0, 4.0)
        factor = fine_factor if fine else worse_factor
        return max(min(self.static_threshold, 50 * given), factor * given)

    def _remember(self, norm, far, *, weight, new):
        for rival in self.rivals:
            rival[1] *= 0.997
        won = None
        if weight:
            hit = next((r for r in self.rivals if r[1] >= 0.5 and abs(deviation(norm, r[0])) <= 0.75), None)
            if hit is None and new:
                weaker = self.rivals[0] if self.rivals[0][1] < self.rivals[1][1] else self.rivals[1]
                weaker[:] = [norm, weight]
            elif hit is not None:
                hit[1] += weight
                hit[0] += (norm - hit[0]) / hit[1]
                won = hit if hit[1] >= 4 else None
        known = self.memory >= 4
        self.memory *= 0.997
        if known and abs(deviation(norm, self.crest)) <= 0.6:
            self.crest = above(self.crest, 0.1 * max(-far, min(far, deviation(norm, self.crest))))
            self.memory = 60.0
        if won is not None:
            self.crest, self.memory, won[1] = won[0], 60.0, 0.0

    def edge(self, level, far):
        return max(above(level, min(far, 0.6)), min(above(level, far), self.static_threshold))

    def _learn_loss(self, loss):
        early = not self.trend.known()
        self.trend.learn(loss)
        if early:
            self.first_loss = self.trend.mean

    def _pace(self, reach, *, spike=False, left_out=False):
        if self.max_pace == 1:
            return
        if not left_out:
            self.taken += 1
        floor = min(1.0, max(self.taken, 1) / self.pace_start)
        useful = self.pace_hold * self.best
        self.done = self.done or self.little
        if math.isfinite(reach):
            self.best = max(self.best, reach)
            useful = max(reach, self.pace_hold * self.best)
        aim = floor if self.done or self.best < self.pace_trust else min(useful, self.max_pace)
        if spike or left_out:
            pace = self.pace_shrink * self.pace
        elif self.pace < aim:
            pace = min(aim, self.pace_growth * self.pace)
        else:
            pace = max(aim, self.pace_shrink * self.pace)
        self.pace = max(floor, pace)
        if reach == -math.inf:
            self.pace, self.best = floor, 0.0
