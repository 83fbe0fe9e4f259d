"""The pace: a multiplier on the learning rate of one step, led by how far the training could usefully go.

    reach_t = d_t / lr_base               d_t: the distance estimate of Prodigy, see `hf_adaclip.gradients.distance`
    best_t  = max(best_{t-1}, reach_t)
    floor_t = min(1, t / start)           the start: t counts from 1 the steps that were not left out
    aim_t   = min(max_pace, max(reach_t, hold best_t))
    aim_t   = floor_t                     while best_t is below `trust`: the given rate is believed
    pace_t  = min(aim_t, growth pace_{t-1})                  while it is below its aim
            = max(aim_t, shrink pace_{t-1})                  while it is above; and after an excursion upward or a skipped step
                                                             max(floor_t, shrink pace_{t-1})
            never below floor_t; pace_0 = 1 / start
    reach_t = -inf                       the data is learned by heart, or its first epoch said nothing: best_t = 0, pace_t = floor_t
    loss <= loss_0 / 20                  aim_t = floor_t from there on, for good, which best_t = -1 stands for

d answers "at which rate would this be quick?" from what has been travelled so far, and it is known only to a factor of two or three. So
it speaks up only where it is more than `trust` times the given rate; until then the given rate stands, after a start. An estimate that
falls (a plateau, a detour) takes the pace back with it, to a third of the best, or to 1 where that is more; it does not stay at its
maximum, as Prodigy's does.

Where the training loss is a twentieth of what it was in the first steps (`hf_adaclip.controllers.numerics.trend`), there is little left to
learn. Gradients are noise then, and so is an estimate that is made of their directions; followed, it drives the weights away.

Source: this package; model_cards/RESEARCH.md has the experiments (entry 39: the twentieth; 42: the way back). The distance estimate:
Mishchenko and Defazio, "Prodigy", 2023, algorithm 4.
"""

from typing import NamedTuple

from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.controllers.numerics.trend import LossTrend, known_trend

LITTLE = 0.05
"""Part of its first losses, below which the training loss says that little is left to learn."""
_DONE = -1.0


class Pace(NamedTuple):
    """Parameters of the pace; see the fields of the same meaning in `AdaptiveClipConfig`."""

    maximum: float
    start: float
    trust: float
    hold: float
    growth: float
    shrink: float


class PaceState(NamedTuple):
    """`pace` of the last step, the `best` reach so far (below 0: the pace is 1 for good), and how many `steps` were taken."""

    pace: Value
    best: Value
    steps: Value


def update_pace(
    pace: Pace, state: PaceState, reach: Value, *, trouble: Value, left_out: Value, little: Value, ops: Ops
) -> PaceState:
    """One step of the pace.

    Args:
        pace: Parameters.
        state: State before the step.
        reach: Distance estimate over the base learning rate; NaN when it is not known, which teaches nothing; -inf takes the pace back
            to 1 at once and forgets the best (see `hf_adaclip.run.overfitting`).
        trouble: Bool, whether the norm left the range upward.
        left_out: Bool, whether the step is left out: then it does not count.
        little: Bool, whether there is little left to learn: the pace goes back to 1, and stays.
        ops: Ops on the state's device.
    """
    one, zero = ops(1.0), ops(0.0)
    known = abs(reach) < ops(float("inf"))  # a NaN compares as False
    steps = ops.where(left_out, state.steps, state.steps + one)
    floor = ops.minimum(one, ops.maximum(steps, one) / ops(pace.start))
    back = reach == ops(float("-inf"))
    done = little | (state.best < zero)
    best = ops.where(known, ops.maximum(state.best, reach), ops.where(back, zero, state.best))
    aim = ops.where(known, ops.maximum(reach, ops(pace.hold) * best), ops(pace.hold) * best)
    aim = ops.where(done | (best < ops(pace.trust)), floor, ops.minimum(aim, ops(pace.maximum)))
    less = state.pace * ops(pace.shrink)
    moved = ops.where(state.pace < aim, ops.minimum(aim, state.pace * ops(pace.growth)), ops.maximum(aim, less))
    moved = ops.where(trouble | left_out, less, moved)
    best = ops.where(done, ops(_DONE), best)
    return PaceState(ops.where(back, floor, ops.maximum(floor, moved)), best, steps)


def little_left(first: Value, trend: LossTrend, ops: Ops) -> Value:
    """Bool, whether the training loss is a small part of what it was in the first steps; False where they were not above 0.

    Args:
        first: Mean of the first losses.
        trend: Of all of them.
        ops: Ops on the state's device.
    """
    return known_trend(trend, ops) & (first > ops(0.0)) & (trend.mean <= ops(LITTLE) * first)
