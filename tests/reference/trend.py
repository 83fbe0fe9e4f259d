"""Whether the loss is near its best, from the formulas of `controllers/trend.py`: lists and branches, float64."""

import math


class TrendReference:
    def __init__(self, bar, slack):
        self.bar, self.slack = bar, slack
        self.losses, self.mean, self.spread, self.best = 0, 0.0, 0.0, 0.0

    def s(self):
        return max(self.spread, 1e-3 * abs(self.mean), 1e-30)

    def known(self):
        return self.losses >= 20

    def far(self):
        return self.mean > self.best + max(self.bar * self.s(), self.slack * abs(self.best))

    def learn(self, loss):
        if not math.isfinite(loss):
            return
        if self.losses == 0:
            self.mean = self.best = loss
        elif self.losses < 20:
            off = loss - self.mean
            self.spread += (abs(off) - self.spread) / self.losses
            self.mean += off / (self.losses + 1)
            self.best = self.mean
        else:
            s, off = self.s(), loss - self.mean
            healthy = self.mean <= self.best + 1.5 * s
            self.mean += 0.1 * min(off, 20 * s)
            self.mean = min(self.mean, self.best + (self.bar + 4) * s + self.slack * abs(self.best))
            if healthy:
                self.spread += 0.02 * (min(abs(off), 2 * s) - self.spread)
            self.best = min(self.best, self.mean)
        self.losses = min(self.losses + 1, 20)
