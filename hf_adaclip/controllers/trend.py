"""The trend of the training loss: whether it is near its best, learned in a bounded way and from healthy steps only.

    off_t    = loss_t - m_{t-1}
    s        = max(spread_{t-1}, 1e-3 |m_{t-1}|, 1e-30)
    m_t      = m + off / (t + 1),  spread the mean of |off|,  best = m             in the first 20 known losses
    m_t      = min(m + 0.1 clip(off, -20 s, 20 s), best + (bar + 4) s + slack)     afterwards
    best_t   = min(best_{t-1}, m_t)
    spread_t = spread + 0.02 (min(|off|, 2 s) - spread)                            while m_{t-1} <= best_{t-1} + 1.5 s
    far      = m_t > best_t + max(bar s, slack)

slack is a part of |best|. A rising loss is far from its best before its spread has grown: beyond 1.5 spreads nothing is learned of the
spread, and below it grows by at most 2 % a step. One loss, however large, moves the mean by two spreads, and the mean stays within sight
of its best, so that a burst is over when the losses are. Losses that are not finite teach nothing, and forget nothing.
"""

from typing import NamedTuple

from hf_adaclip.controllers.ops import Ops, Value

FIRST_LOSSES = 20
_KEEP_UP, _SLOWLY = 0.1, 0.02
_LEAP, _OUTLIER, _HEALTHY, _IN_SIGHT = 20.0, 2.0, 1.5, 4.0
_RELATIVE_FLOOR, _FLOOR = 1e-3, 1e-30


class LossTrend(NamedTuple):
    """`mean`, `spread` and `best` of the training loss, and how many losses were `seen`; each of the norm's shape."""

    mean: Value
    spread: Value
    best: Value
    seen: Value


def known_trend(trend: LossTrend, ops: Ops) -> Value:
    """Bool, whether enough losses are known to say anything."""
    return trend.seen >= ops(float(FIRST_LOSSES))


def far_from_best(trend: LossTrend, bar: float, slack: float, ops: Ops) -> Value:
    """Bool, whether the mean is more than `bar` spreads, and more than the part `slack` of its best, above its best."""
    return trend.mean > trend.best + ops.maximum(ops(bar) * spread_of(trend, ops), ops(slack) * abs(trend.best))


def follow_loss(trend: LossTrend, loss: Value, bar: float, slack: float, ops: Ops) -> LossTrend:
    """The trend after one more loss.

    Args:
        trend: Before.
        loss: Float32, of the trend's shape; NaN when it is not known.
        bar: Spreads above the best that count as far.
        slack: Part of the best that never counts as far.
        ops: The kind of numbers that these are.
    """
    one, zero = ops(1.0), ops(0.0)
    known = abs(loss) < ops(float("inf"))
    begun, early = trend.seen > zero, trend.seen < ops(float(FIRST_LOSSES))
    s = spread_of(trend, ops)
    off = loss - trend.mean
    size = abs(off)

    first_mean = trend.mean + off / (trend.seen + one)
    mean = trend.mean + ops(_KEEP_UP) * ops.minimum(ops.maximum(off, ops(-_LEAP) * s), ops(_LEAP) * s)
    mean = ops.minimum(mean, trend.best + ops(bar + _IN_SIGHT) * s + ops(slack) * abs(trend.best))
    mean = ops.where(begun, ops.where(early, first_mean, mean), loss)

    first_spread = trend.spread + (size - trend.spread) / ops.maximum(trend.seen, one)
    spread = trend.spread + ops(_SLOWLY) * (ops.minimum(size, ops(_OUTLIER) * s) - trend.spread)
    healthy = trend.mean <= trend.best + ops(_HEALTHY) * s
    spread = ops.where(begun, ops.where(early, first_spread, ops.where(healthy, spread, trend.spread)), zero)
    best = ops.where(early, mean, ops.minimum(trend.best, mean))
    return LossTrend(
        mean=ops.where(known, mean, trend.mean),
        spread=ops.where(known, spread, trend.spread),
        best=ops.where(known, best, trend.best),
        seen=ops.where(known, ops.minimum(trend.seen + one, ops(float(FIRST_LOSSES))), trend.seen),
    )


def spread_of(trend: LossTrend, ops: Ops) -> Value:
    """The spread, never quite 0."""
    return ops.maximum(ops.maximum(trend.spread, ops(_RELATIVE_FLOOR) * abs(trend.mean)), ops(_FLOOR))
