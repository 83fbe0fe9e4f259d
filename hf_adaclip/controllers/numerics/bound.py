"""The bound on the range of `adaptive`: norms that agree with each other prove nothing about the training, those of a divergence do so too.

    g_0   = level at the end of the warm-up
    g_t   = max(g, min(1.5 L_t, 1.03 g)) at a new best of the loss; min(L_t, static) while held
    bound = max(min(static, 50 g), k g)             none while held; k = 1 where the loss is known to be high: its mean more
                                                    than 2 spreads above its best, or that of the step more than 4
                                                    (`trend.py`); k = 1.25 otherwise
                                                    with ceiling_share 1 (and tensor by tensor) k = 4 for 1, and 8 for 1.25

So what the static threshold lets through is followed. Beyond it only progress takes the range, a little with each new best of the loss.
Where no loss is known there is no evidence of progress, and a quarter more than the level that was given is all.
"""

from typing import NamedTuple

from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.controllers.numerics.trend import LossTrend, far_from_best, known_trend, spread_of

RELEASE = 0.2
"""The ceiling is given up when the static threshold cuts this part of `ceiling_share` of recent steps: a tenth of them, by default."""

ALLOWANCE, REACH, RENEWAL, HEADROOM = 1.25, 50.0, 1.03, 1.5
"""How far the range may leave the given level beyond the static threshold, and how far below it; by how much a new best of the loss lets
the given level follow, and how far above the running one."""

WIDE, WORSE = 8.0, 4.0
"""How far it may leave the given level where the static threshold is never the ceiling (a tensor of many), and while the loss is worse."""

LOSS_BAR, OWN_BAR = 2.0, 4.0
"""Spreads above its best at which the loss speaks against a wider range: its mean, and that of the step itself."""


class Ceiling(NamedTuple):
    """`bound`: no threshold is above it. `held`: the static threshold is the ceiling. `share`: of norms that it cuts.

    `given`: what the bound goes by. `trusted`: the loss does not speak against a wider range.
    """

    bound: Value
    held: Value
    share: Value
    given: Value
    trusted: Value


def ceiling_of(
    static: Value,
    loss: Value,
    *,
    level: Value,
    given: Value,
    count: Value,
    acted: Value,
    trend: LossTrend,
    warmup: int,
    ceiling_share: float,
    ops: Ops,
) -> Ceiling:
    """What no threshold may be above, from the past alone.

    Args:
        static: The static threshold.
        loss: Training loss of the step.
        level, given, count, acted, trend: Of the state, see `AdaptiveState`.
        warmup: Norms of the warm-up.
        ceiling_share: The setting.
        ops: The kind of numbers that all of these are.
    """
    one = ops(1.0)
    observations = ops(float(warmup))
    first = count <= observations
    share = ops.where(first, acted / observations, acted)
    past = count >= observations
    held = past & (share > ops(ceiling_share) * ops.where(first, one, ops(RELEASE)))
    given = ops.where(given > ops(0.0), given, level)
    known = known_trend(trend, ops)
    trusted = ~(known & far_from_best(trend, LOSS_BAR, 0.0, ops))
    own = loss <= trend.best + ops(OWN_BAR) * spread_of(trend, ops)
    # A static threshold that is never the ceiling says nothing of the level, which may be far above it.
    usual, worse = (ALLOWANCE, 1.0) if ceiling_share < 1 else (WIDE, WORSE)
    allowed = given * ops.where(known & ~(trusted & own), ops(worse), ops(usual))
    bound = ops.maximum(ops.minimum(static, given * ops(REACH)), allowed)
    # Held, the static threshold is bound enough, and the level is free to be above it.
    bound = ops.where(held, ops(float("inf")), bound)
    return Ceiling(bound, held, share, given, trusted)


def next_given(ceiling: Ceiling, level: Value, better: Value, static: Value, ops: Ops) -> Value:
    """What the bound goes by in the next step.

    Args:
        ceiling: Of this step.
        level: Running level after it.
        better: Bool, whether the loss is at a new best.
        static: The static threshold.
        ops: The kind of numbers that all of these are.
    """
    renewed = ops.minimum(level * ops(HEADROOM), ceiling.given * ops(RENEWAL))
    given = ops.where(better, ops.maximum(ceiling.given, renewed), ceiling.given)
    return ops.where(ceiling.held, ops.minimum(level, static), given)
