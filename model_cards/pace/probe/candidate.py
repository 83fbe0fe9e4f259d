"""The best candidate, `reach`: the pace follows a running estimate of how far the way travelled so far was useful.

Two parts. `Reach` is what the clipper keeps on the device (two vectors on a sample of the coordinates) and gives ONE scalar per step,
`d`. `next_pace` is the controller's part: pure, + - * / and comparisons only, on (state, observation).
"""

from typing import NamedTuple

# -- part 1: the scalar that the clipper measures ----------------------------------------------------------------------

MEMORY = 0.98  # forgetting per step of the estimate, about 50 steps


class Reach:
    """d = r / |s|_1 on the sampled coordinates; x and g are lists (or tensors) of floats, g before clipping.

    w_t = (pace_{t-1} lr_t) (pace_{t-1} lr_base) / |g_t|     every gradient counts with length 1, weighted by the rate in force
    r_t = MEMORY r_{t-1} + w_t <g_t, x_0 - x_t>
    s_t = MEMORY s_{t-1} + w_t g_t
    d_t = r_t / sum_i |s_t,i|

    lr_t is the scheduled rate of the last step, lr_base the group's `initial_lr`. Prodigy (Mishchenko and Defazio 2023) has this
    quotient with memory sqrt(beta2), takes its running maximum, and makes it the learning rate.
    """

    def __init__(self, x):
        self.start = list(x)
        self.s = [0.0] * len(self.start)
        self.r = 0.0

    def observe(self, x, g, effective, effective_peak):
        length = sum(v * v for v in g) ** 0.5 + 1e-30
        w = effective * effective_peak / length
        self.r = MEMORY * self.r + w * sum(gi * (a - b) for gi, a, b in zip(g, self.start, x, strict=True))
        self.s = [MEMORY * si + w * gi for si, gi in zip(self.s, g, strict=True)]
        return self.r / (sum(abs(v) for v in self.s) + 1e-30)


# -- part 2: the controller's part -------------------------------------------------------------------------------------


class ReachConfig(NamedTuple):
    max_pace: float = 64.0
    begin: float = 0.125  # pace of the first step; 1.0 for a pace that is never below 1
    ramp: float = 1.1  # growth per step while below 1
    growth: float = 1.1  # growth per step while below the target
    shrink: float = 0.95  # per step while above the target (and above 1)
    hold: float = 1 / 3  # part of the largest d that is held when the present d is smaller


class ReachState(NamedTuple):
    pace: float
    best: float = 0.0
    count: int = 0


def next_pace(c: ReachConfig, state: ReachState, d: float, base_lr: float, spike: bool) -> ReachState:
    """One step; a d that is NaN (non-finite gradient) or a spike leaves the pace as it is."""
    known = d == d
    best = max(state.best, d) if known else state.best
    wanted = max(d, c.hold * best) if known else c.hold * best
    target = min(c.max_pace, wanted / base_lr)
    pace = state.pace
    if state.count == 0 or spike or not known:
        pass
    elif pace > max(1.0, target):
        pace = max(1.0, target, pace * c.shrink)
    elif pace < target:
        pace = min(target, pace * c.growth)
    elif pace < 1.0 and d >= 0.0:
        pace = min(1.0, pace * c.ramp)
    return ReachState(pace, best, state.count + 1)


def init(c: ReachConfig) -> ReachState:
    return ReachState(c.begin)


if __name__ == "__main__":  # replay recorded runs: python candidate.py traces/*_reach_*.npz
    import sys

    import numpy as np

    for file in sys.argv[1:]:
        t = np.load(file)
        state, worst = init(ReachConfig()), 0.0
        for d, rate, spike, pace in zip(t["dn98"], t["lr_peak"], t["spike"], t["pace"], strict=True):
            state = next_pace(ReachConfig(), state, float(d), float(rate), bool(spike))
            worst = max(worst, abs(state.pace / float(pace) - 1))
        print(f"{worst:.1e} largest relative difference  {file}")
